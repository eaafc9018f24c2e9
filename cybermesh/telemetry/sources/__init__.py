"""Where telemetry comes from: one module an input format."""

"""CyberMesh: network telemetry in, signed detections, agreement among validators, provable firewall rules out."""

__version__ = "0.1.0"

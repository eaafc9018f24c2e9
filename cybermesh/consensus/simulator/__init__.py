"""A whole committee in one deterministic thread."""

"""Packets and logs to flows, windows and the 79 features."""

"""Flows and windows to detections that explain themselves."""

"""Decisions to firewall rules, behind a guard that nothing skips."""

"""Metrics for the `evaluate` library, and what they count."""

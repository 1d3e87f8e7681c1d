"""Drift detection on a user's stream."""

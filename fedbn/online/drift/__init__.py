"""Drift detection on the streams of users."""

"""Checkpoints and provenance of results."""

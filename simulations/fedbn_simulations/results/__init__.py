"""Stored results, the evaluation matrix, intervals and tests."""

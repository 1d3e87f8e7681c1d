"""Clipping, noise, secure aggregation and privacy accounting."""

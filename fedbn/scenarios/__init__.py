"""Scenarios, one module each; modules of this package are discovered automatically."""

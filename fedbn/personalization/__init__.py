"""Personalization methods, one per module; all modules of this package are discovered automatically."""

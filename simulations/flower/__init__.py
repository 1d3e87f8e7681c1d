"""Flower's processes and certificates."""

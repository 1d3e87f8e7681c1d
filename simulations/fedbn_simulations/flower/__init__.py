"""Flower's processes and certificates, and its internals."""

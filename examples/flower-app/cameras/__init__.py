"""Handwritten digits, photographed by a different camera at each client."""

"""Utilities for any PyTorch model: roles of state entries, layer conversion, hooks, inference, threads."""

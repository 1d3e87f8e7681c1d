"""Benchmarks: the time of a round compared with a plain PyTorch loop (``python -m benchmarks``)."""

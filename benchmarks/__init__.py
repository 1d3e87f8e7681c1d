"""How long a round takes, against a bare PyTorch loop: ``python -m benchmarks``."""

"""Protocols: settings of published benchmarks."""

"""Experiments: several strategies with several seeds, executed and resumed."""

"""The command line."""

from fedbn_simulations.cli.app import main

__all__ = ["main"]

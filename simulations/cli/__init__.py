"""The command line."""

from simulations.cli.app import main

__all__ = ["main"]

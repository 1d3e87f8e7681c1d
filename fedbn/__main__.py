"""Command line ``python -m fedbn``; runs the installed entry point ``fedbn``."""

from __future__ import annotations

from importlib.metadata import entry_points

if __name__ == "__main__":
    (command,) = entry_points(group="console_scripts", name="fedbn")
    command.load()()

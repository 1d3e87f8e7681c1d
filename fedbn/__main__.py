"""``python -m fedbn`` is the command line, found by the name under which it is installed."""

from __future__ import annotations

from importlib.metadata import entry_points

if __name__ == "__main__":
    (command,) = entry_points(group="console_scripts", name="fedbn")
    command.load()()

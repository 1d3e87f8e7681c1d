"""The option ``--quiet`` of every command: no progress and no tables, only errors and ``--json`` output."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from typing import Any

import click
import typer
from typer.core import TyperCommand


class Quiet(TyperCommand):
    """A command with the option ``--quiet`` and a message on interruption."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        text = "Print only errors and the output of --json."
        self.params.append(typer.core.TyperOption(param_decls=["--quiet", "-q"], is_flag=True, help=text))

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command, discarding its output if ``--quiet`` is given."""
        try:
            with ExitStack() as stack:
                if ctx.params.pop("quiet"):
                    devnull = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
                    stack.enter_context(redirect_stderr(devnull))
                    if not ctx.params.get("as_json"):
                        stack.enter_context(redirect_stdout(devnull))
                return super().invoke(ctx)
        except KeyboardInterrupt:
            # Typer would turn it into a silent exit before the entry point can catch it.
            print("interrupted; finished results are stored", file=sys.stderr)
            raise typer.Exit(130) from None


def add_quiet_option(app: typer.Typer) -> Callable[[], Any]:
    """Add ``--quiet`` to every registered command of ``app``, and return ``app``."""
    for command in app.registered_commands:
        if not issubclass(kind := command.cls or TyperCommand, Quiet):
            command.cls = type("Quiet", (Quiet, kind), {})
    return app

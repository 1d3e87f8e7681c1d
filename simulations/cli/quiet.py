"""``--quiet`` on every command: no progress, no tables; errors, exit codes and ``--json`` stay."""

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
    """A command with one option more, which says so when it is interrupted; errors are printed by the entry point."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        told = "Print nothing but errors, and what --json asks for."
        self.params.append(typer.core.TyperOption(param_decls=["--quiet", "-q"], is_flag=True, help=told))

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command, its output thrown away if so asked."""
        try:
            with ExitStack() as stack:
                if ctx.params.pop("quiet"):
                    nowhere = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
                    stack.enter_context(redirect_stderr(nowhere))
                    if not ctx.params.get("as_json"):
                        stack.enter_context(redirect_stdout(nowhere))
                return super().invoke(ctx)
        except KeyboardInterrupt:
            # Here, for typer turns it into a silent exit before the entry point sees it.
            print("interrupted; what was finished is kept", file=sys.stderr)
            raise typer.Exit(130) from None


def add_quiet_option(app: typer.Typer) -> Callable[[], Any]:
    """Give every command of ``app`` the option, and return ``app``; call it after the last one is registered."""
    for command in app.registered_commands:
        command.cls = Quiet
    return app

"""Every command: the option ``--quiet`` (only errors and ``--json`` output), help of arguments, options of Flower."""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Callable
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from typing import Any

import click
import typer
from typer.core import TyperArgument, TyperCommand
from typer.utils import get_params_from_function

from fedbn.errors import UserError

COUNT = "give the number of clients of a round with --clients-per-round, e.g. 5"
CLIENTS = (
    "the number of clients follows from the users of the scenario or from --partition, e.g. digits8:users=4 or "
    "dirichlet:alpha=0.1:clients=20"
)
FLOWER_OPTIONS = {
    "--fraction-fit": COUNT,
    "--fraction-train": COUNT,
    "--num-clients": CLIENTS,
    "--num-supernodes": CLIENTS,
}
"""Options of Flower that have no equal, and what replaces them."""


class Quiet(TyperCommand):
    """A command with the option ``--quiet`` and a message on interruption."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        text = "Print only errors and the output of --json."
        self.params.append(typer.core.TyperOption(param_decls=["--quiet", "-q"], is_flag=True, help=text))
        _restore_help(self)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse the arguments; options of Flower that have no equal are answered with those that replace them."""
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            if error.option_name in FLOWER_OPTIONS:
                raise UserError(f"{error.option_name} is not an option: {FLOWER_OPTIONS[error.option_name]}") from None
            raise

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


def _restore_help(command: click.Command) -> None:
    """Restore the help of arguments, which Click from 8.5 deletes where they come from Typer before 0.21."""
    function = inspect.unwrap(command.callback) if command.callback else None
    infos = {name: meta.default for name, meta in get_params_from_function(function).items()} if function else {}
    for parameter in command.params:
        if isinstance(parameter, TyperArgument) and not parameter.help:
            parameter.help = infos[parameter.name].help if parameter.name in infos else None


def add_quiet_option(app: typer.Typer) -> Callable[[], Any]:
    """Add ``--quiet`` to every registered command of ``app``, and return ``app``."""
    for command in app.registered_commands:
        if not issubclass(kind := command.cls or TyperCommand, Quiet):
            command.cls = type("Quiet", (Quiet, kind), {})
    return app

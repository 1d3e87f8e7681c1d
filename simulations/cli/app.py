"""The command line. Heavy imports are inside the commands, so that ``fedbn --help`` starts fast."""

from __future__ import annotations

import sys
from importlib import metadata
from typing import Annotated

import typer

from fedbn.errors import UserError
from simulations.cli.adapt import adapt
from simulations.cli.catalog import advise, audit, data, list_
from simulations.cli.claims import claims
from simulations.cli.compare import compare, resume
from simulations.cli.deploy import deploy
from simulations.cli.eeg import eeg
from simulations.cli.export import export
from simulations.cli.leakage import leakage
from simulations.cli.new import new
from simulations.cli.options import errors
from simulations.cli.quiet import add_quiet_option
from simulations.cli.report import report
from simulations.cli.service import demo, serve

app = typer.Typer(
    name="fedbn",
    help="Federated and domain-adaptive batch normalization: compare, adapt, report, serve.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
operations = (claims, eeg, deploy, adapt, serve, demo, report, export, leakage, new, compare, resume)
for command in (*operations, advise, list_, audit, data):
    app.command(command.__name__.rstrip("_"))(command)
for alias in ("personalize", "personalise"):
    app.command(alias, hidden=True)(adapt)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"fedbn {metadata.version('fedbn')}")
        raise typer.Exit


@app.callback()
def _before(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None: ...


def main() -> None:
    """Entry point. User errors print one line and exit with code 2; an interruption exits with code 130."""
    sys.path.insert(0, "")  # so that models and scenarios in the working directory can be imported
    try:
        add_quiet_option(app)()
    except UserError as error:
        errors.print(f"[bold red]error:[/] {_plain(str(error))}", highlight=False)
        sys.exit(2)


def _plain(text: str) -> str:
    return text.replace("[", r"\[")

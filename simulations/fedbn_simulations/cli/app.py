"""The command line. Heavy imports are inside the commands, so that ``fedbn --help`` starts fast."""

from __future__ import annotations

import errno
import inspect
import os
import re
import signal
import sys
from collections.abc import Callable
from importlib import metadata
from types import FrameType
from typing import Annotated

import typer

from fedbn.errors import UserError
from fedbn_simulations.cli.adapt import adapt
from fedbn_simulations.cli.catalog import advise, audit, data, list_
from fedbn_simulations.cli.claims import claims
from fedbn_simulations.cli.compare import CompareCommand, compare, resume
from fedbn_simulations.cli.deploy import deploy
from fedbn_simulations.cli.doctor import doctor
from fedbn_simulations.cli.eeg import eeg
from fedbn_simulations.cli.export import export
from fedbn_simulations.cli.leakage import leakage
from fedbn_simulations.cli.new import new
from fedbn_simulations.cli.options import errors
from fedbn_simulations.cli.papers import reproduce
from fedbn_simulations.cli.quiet import add_quiet_option
from fedbn_simulations.cli.report import report
from fedbn_simulations.cli.run import run
from fedbn_simulations.cli.service import demo, serve
from fedbn_simulations.cli.terminal import write_any_terminal

app = typer.Typer(
    name="fedbn",
    help="Federated and domain-adaptive batch normalization: compare, adapt, report, serve.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
ALLOCATION_FAILED = re.compile(
    "can't allocate memory|cannot allocate memory|out of memory|failed to map segment|can't start new thread",
    re.IGNORECASE,
)


def _unwrapped(command: Callable[..., None]) -> str:
    """The docstring of a command with one line per paragraph, since typer keeps the line breaks of the source."""
    paragraphs = inspect.cleandoc(command.__doc__ or "").split("\n\n")
    return "\n\n".join(paragraph.replace("\n", " ") for paragraph in paragraphs)


PANELS: dict[str, tuple[Callable[..., None], ...]] = {
    "Compare strategies": (compare, resume, report, advise, claims, reproduce),
    "Adapt and deploy": (adapt, demo, serve, run, deploy, export),
    "Inspect and extend": (list_, data, audit, doctor, leakage, eeg, new),
}
for panel, commands in PANELS.items():
    for command in commands:
        cls = CompareCommand if command is compare else None
        app.command(command.__name__.rstrip("_"), cls=cls, help=_unwrapped(command), rich_help_panel=panel)(command)
for alias in ("personalize", "personalise"):
    app.command(alias, help=_unwrapped(adapt), hidden=True)(adapt)


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
    """Entry point. User errors print one line and exit with code 2; SIGINT and SIGTERM exit with code 130."""
    sys.path.insert(0, "")  # so that models and scenarios in the working directory can be imported
    write_any_terminal()
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        add_quiet_option(app)()
    except (UserError, MemoryError, OSError, RuntimeError, ImportError) as error:
        if (message := user_message(error)) is None:
            raise
        errors.print(f"[bold red]error:[/] {_plain(message)}", highlight=False)
        sys.exit(2)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def user_message(error: Exception) -> str | None:
    """The message of an error that the user can fix; None for any other error.

    >>> user_message(OSError(28, "No space left on device", "out/a"))
    'No space left on device (out/a): free disk space and run the same command again; finished results are stored'
    """
    if isinstance(error, UserError):
        return str(error)
    number = error.errno if isinstance(error, OSError) else None
    if number in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
        place = f" ({error.filename})" if isinstance(error, OSError) and error.filename else ""
        return (
            f"{os.strerror(number)}{place}: free disk space and run the same command again; finished results are stored"
        )
    # A failed allocation is a RuntimeError in PyTorch, and an ImportError where a library is loaded.
    if isinstance(error, MemoryError) or number == errno.ENOMEM or ALLOCATION_FAILED.search(str(error)):
        return (
            "not enough memory: use fewer --workers, a smaller --batch-size or a smaller model; "
            "finished results are stored"
        )
    if type(error).__name__ == "BrokenProcessPool":
        return (
            "a worker process was killed, probably for lack of memory: use fewer --workers; finished results are stored"
        )
    return None


def _plain(text: str) -> str:
    return text.replace("[", r"\[")

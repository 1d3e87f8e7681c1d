"""Options shared by commands, and command-line flags derived from the fields of dataclasses."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import os
import shlex
import sys
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TextIO

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from fedbn.config import Conditions, Panel, parts
from fedbn.errors import UserError
from fedbn_simulations.report.layout import fitted_table


def _console(stream: TextIO, **options: Any) -> Console:
    """A console that wraps nothing where its stream is no terminal and ``COLUMNS`` is not set."""
    is_narrow = stream.isatty() or "COLUMNS" in os.environ
    return Console(width=None if is_narrow else UNLIMITED, **options)


UNLIMITED = 10_000
"""Width of output that goes to a file or a pipe, in characters."""

console = _console(sys.stdout)
errors = _console(sys.stderr, stderr=True)

OUTPUT = "Output"

PANELS = typing.get_args(Panel)

Out = Annotated[
    Path | None,
    typer.Option(
        help="Directory of results.", show_default="results/SCENARIO, with a digest if taken", rich_help_panel=OUTPUT
    ),
]
Track = Annotated[
    list[str] | None,
    typer.Option(
        help="Also log to tensorboard:DIR, mlflow:DIR or wandb:DIR (offline); repeatable.",
        show_default=False,
        rich_help_panel=OUTPUT,
    ),
]
Workers = Annotated[
    int | None, typer.Option(min=1, help="Worker processes.", show_default="one per core", rich_help_panel=OUTPUT)
]
Into = Annotated[
    Path | None,
    typer.Option(
        help="Also put the table into this document, between its markers.", show_default=False, rich_help_panel=OUTPUT
    ),
]
Metric = Annotated[
    str,
    typer.Option(
        help="Metric of tables and intervals, e.g. macro_f1.",
        show_default="the comparison's",
        rich_help_panel=OUTPUT,
    ),
]
AsJson = Annotated[
    bool, typer.Option("--json", help="Print the result as JSON instead of tables.", rich_help_panel=OUTPUT)
]
RunFile = Annotated[
    Path | None, typer.Option(help="TOML file with the same options.", show_default=False, rich_help_panel="Data")
]
Scenario = Annotated[
    str | None, typer.Argument(help="Data set with options, e.g. hapt:unseen=10; see fedbn list scenarios.")
]
Data = Annotated[
    Path | None,
    typer.Option(
        help="Your own .npz, .csv or .parquet file, or a directory of these, instead of a scenario.",
        show_default=False,
        rich_help_panel="Data",
    ),
]
Columns = Annotated[
    str | None,
    typer.Option(
        help="With --data: its columns and other options, e.g. x=acc:y=activity:user=subject:window=128.",
        show_default="x, y, user, recording",
        rich_help_panel="Data",
    ),
]


def progress_bars(*, disable: bool) -> Progress:
    """One bar per task on stderr: its description, steps, and elapsed and remaining time."""
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
    return Progress(TextColumn("{task.description}"), *columns, console=errors, disable=disable)


def print_table(rows: Sequence[Mapping[str, str]], **layout: Any) -> None:
    """Print rows with the same keys, which head the columns; ``layout`` goes to `fitted_table`."""
    console.print(fitted_table(rows, console.width, **layout))


def suggest(*commands: Sequence[str | Path]) -> None:
    """Print commands that continue from a result, each given by its arguments."""
    for i, command in enumerate(commands):
        console.print(Text(("next: " if not i else "      ") + shlex.join(map(str, command))), soft_wrap=True)


def options_of(*kinds: type, without: tuple[str, ...] = ()) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command one flag per field of dataclasses.

    The command receives the flags that were given as the dictionary ``options``: field -> value. Where one of the
    dataclasses has a scenario, ``--data`` and ``--columns`` are added, and set ``options["scenario"]``. Parameters that
    the command has itself are left to it.

    Args:
        kinds: dataclasses whose fields are made with `fedbn.config.option`.
        without: fields without a flag.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        hints = typing.get_type_hints(command, include_extras=True)
        signature = inspect.signature(command).parameters
        own = [p.replace(annotation=hints[n]) for n, p in signature.items() if n != "options"]
        skipped = {"plan", "scenario", *signature, *without}
        types_of = {kind: typing.get_type_hints(kind) for kind in kinds}
        chosen = {
            f.name: (f, types_of[kind][f.name])
            for kind in kinds
            for f in dataclasses.fields(kind)
            if f.name not in skipped
        }
        flags = [_flag(f, hint) for f, hint in chosen.values()]
        keyword = inspect.Parameter.KEYWORD_ONLY
        if reads_data := any(issubclass(kind, Conditions) for kind in kinds):
            flags = [
                inspect.Parameter("data", keyword, default=None, annotation=Data),
                inspect.Parameter("columns", keyword, default=None, annotation=Columns),
                *flags,
            ]

        @functools.wraps(command)
        def wrapper(**arguments: Any) -> None:
            options: dict[str, Any] = {}
            if reads_data:
                scenario = scenario_text(arguments.get("scenario"), arguments.pop("data"), arguments.pop("columns"))
                options |= {"scenario": scenario} if scenario else {}
                if "scenario" in signature:
                    arguments["scenario"] = scenario
            given = {name: arguments.pop(name) for name in chosen}
            options |= {name: _parsed(value, *chosen[name]) for name, value in given.items() if value is not None}
            command(**arguments, options=options)

        del wrapper.__wrapped__  # type: ignore[attr-defined]
        parameters = sorted([*(p.replace(kind=keyword) for p in own), *flags], key=_panel)
        wrapper.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        wrapper.__annotations__ = {p.name: p.annotation for p in parameters}
        return wrapper

    return decorate


def field_help(kind: type, name: str) -> str:
    """Help text of a dataclass field."""
    return next(str(f.metadata["help"]) for f in dataclasses.fields(kind) if f.name == name)


def scenario_text(scenario: str | None, data: Path | None, columns: str | None) -> str | None:
    """The scenario that is named, or that reads a file of the user.

    Raises:
        UserError: both are given, columns without a file, or a path that reads like options.
    """
    if data is None:
        if columns:
            raise UserError("--columns goes with --data: name the file that has these columns")
        return scenario
    if scenario:
        raise UserError("give a scenario or --data, not both")
    if "=" in str(data.resolve()).partition(":")[2]:
        raise UserError(f"a path with a colon before an equals sign is not supported: rename {data}")
    return f"files:path={data.resolve()}" + (f":{columns}" if columns else "")


def numbers(text: str) -> tuple[float, ...]:
    """The numbers of a comma-separated list.

    Raises:
        UserError: a part is not a number.
    """
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise UserError(f"expected numbers separated by commas, not {text!r}") from None


def _flag(f: dataclasses.Field[Any], hint: Any) -> inspect.Parameter:
    """A command-line flag for a field; None means that it was not given."""
    kind = next((t for t in typing.get_args(hint) if t is not type(None)), hint) if _is_union(hint) else hint
    text = f.metadata["help"]
    if typing.get_origin(kind) is Literal:
        text = f"{text} One of {', '.join(typing.get_args(kind))}."
    if kind not in (int, float, bool):
        kind = str
    names = f.metadata["flags"] or ("--" + f.name.replace("_", "-"),)
    if default := _default(f):
        # As a part of the text, because typer puts a default that is given as a text in parentheses.
        text = rf"{text} [dim]\[default: {default}][/]"
    settings = typer.Option(*names, help=text, show_default=False, rich_help_panel=f.metadata["panel"])
    return inspect.Parameter(
        f.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, settings]
    )


def _panel(parameter: inspect.Parameter) -> int:
    """Position of a parameter's help panel: options without one first, those of a command's own panel last."""
    (info,) = parameter.annotation.__metadata__
    panel = info.rich_help_panel
    return PANELS.index(panel) if panel in PANELS else len(PANELS) if isinstance(panel, str) else -1


def _default(f: dataclasses.Field[Any]) -> str:
    """The default of a field as the help shows it; empty to show none."""
    # Spaces after commas, because the help can only be wrapped there.
    return "the scenario's" if f.metadata["by_scenario"] else _text(f.default).replace(",", ", ")


def _text(value: Any) -> str:
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return "" if value is None or value is False or value is dataclasses.MISSING else str(value)


def _parsed(value: Any, f: dataclasses.Field[Any], hint: Any) -> Any:
    """The value of a field from that of its flag. Lists and tables are comma-separated."""
    if typing.get_origin(hint) is tuple:
        return parts(value)
    if typing.get_origin(hint) is dict:
        pairs = [part.partition("=") for part in parts(value)]
        if wrong := [key for key, sep, _ in pairs if not sep]:
            raise UserError(f"--{f.name.replace('_', '-')} takes NAME=VALUE, comma-separated, not {wrong[0]!r}")
        return {key: text for key, _, text in pairs}
    return value


def _is_union(hint: Any) -> bool:
    return typing.get_origin(hint) in (typing.Union, types.UnionType)

"""Options and consoles shared by commands."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from fedbn.errors import UserError

console = Console()


errors = Console(stderr=True)


Out = Annotated[
    Path | None, typer.Option(help="Directory of results; default results/SCENARIO, with a digest if taken.")
]


Track = Annotated[
    list[str] | None,
    typer.Option(help="Also log to tensorboard:DIR, mlflow:DIR or wandb:DIR (offline); repeatable."),
]


Workers = Annotated[int | None, typer.Option(min=1, help="Processes; default one a core.")]


AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON instead of tables.")]


def _strategies(text: str | None) -> tuple[str, ...] | None:
    if text is None:
        return None
    if text == "all":
        from fedbn.strategies.base import strategies

        return "global-naive", *(name for name in strategies() if name != "global-naive")
    return tuple(filter(None, (part.strip() for part in text.split(","))))


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise UserError(f"expected numbers separated by commas, not {text!r}") from None

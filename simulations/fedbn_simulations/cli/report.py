"""``fedbn report``: tables and HTML page of one comparison, or of several side by side."""

from __future__ import annotations

import json
import time
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedbn.errors import UserError
from fedbn_simulations.cli.options import AsJson, Into, Metric, console

if TYPE_CHECKING:
    from fedbn_simulations.results.comparison import Comparison


class Format(StrEnum):
    """File formats of the evaluation matrix."""

    CSV = "csv"
    LATEX = "latex"
    MARKDOWN = "markdown"


def report(
    directories: Annotated[
        list[Path], typer.Argument(help="Directory of a comparison, or several to show side by side.")
    ],
    format_: Annotated[
        Format | None,
        typer.Option(
            "--format",
            help="Write only the evaluation matrix, in this format, to --out or the terminal.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="File for --format, or for the page of several comparisons.", show_default="side-by-side.html"
        ),
    ] = None,
    into: Into = None,
    full: Annotated[
        bool, typer.Option("--full", help="With --into: also the starts of unseen users, and costs.")
    ] = False,
    brief: Annotated[
        bool, typer.Option("--brief", help="With --into: only means of the first five strategies.")
    ] = False,
    figures: Annotated[bool, typer.Option("--figures", help="Also write the figures as PNG and PDF.")] = False,
    metric: Metric = "",
    as_json: AsJson = False,
) -> None:
    """Print the tables of a comparison and write its HTML report, or show several side by side.

    Example: [bold]fedbn report results/hapt --format latex --out hapt.tex[/]
    """
    several = len(directories) > 1
    if into is not None and (several or format_ is not None):
        raise UserError("--into takes one directory and no --format")
    if (full or brief) and into is None:
        raise UserError(f"{'--full' if full else '--brief'} goes with --into: name the document")
    if full and brief:
        raise UserError("give --full or --brief, not both")
    if format_ is not None and as_json:
        raise UserError("give --format or --json, not both")
    if out is not None and not several and format_ is None:
        raise UserError("a comparison's page is written into its directory: --out goes with --format")
    if figures and (several or format_ is not None):
        raise UserError("--figures takes one directory and no --format")
    if format_ is not None:
        _write(directories, format_, out, metric)
    elif several:
        _show_side_by_side(directories, out or Path("side-by-side.html"), as_json, metric)
    else:
        show_comparison(directories[0], as_json, metric, print_formats=figures)
    if into is not None:
        from fedbn_simulations.report.documents import update_document

        update_document(directories[0], into, full=full, brief=brief, metric=metric)


def show_comparison(directory: Path, as_json: bool, metric: str = "", *, print_formats: bool = False) -> Comparison:
    """Write the page of a comparison, and print its tables, or all results as JSON; returns the comparison.

    With ``print_formats``, the figures are also written as PNG and PDF.
    """
    start = time.process_time()
    from fedbn_simulations.report.page import write_report
    from fedbn_simulations.report.terminal import show
    from fedbn_simulations.results.comparison import Comparison
    from fedbn_simulations.results.summary import answer

    comparison = Comparison.load(directory, metric)
    page = write_report(comparison, print_formats=print_formats)
    if as_json:
        matrix = json.loads(comparison.matrix().to_json(orient="records"))
        paired = json.loads(comparison.paired().to_json(orient="records"))
        found = {"answer": answer(comparison), "matrix": matrix, "paired": paired, "report": str(page)}
        print(json.dumps(found, indent=1))
    else:
        show(comparison, console)
        seconds = [comparison.time] * bool(comparison.time) + [f"report {time.process_time() - start:.1f}"]
        console.print(f"CPU seconds: {', '.join(seconds)}", soft_wrap=True)
        console.print(f"report: {page.resolve()}", soft_wrap=True)
    return comparison


def _write(directories: list[Path], format_: Format, out: Path | None, metric: str) -> None:
    from fedbn.files import write_atomically
    from fedbn_simulations.report.page import FORMATS
    from fedbn_simulations.results.comparison import Comparison
    from fedbn_simulations.results.side_by_side import SideBySide

    found = SideBySide.load(directories, metric) if len(directories) > 1 else Comparison.load(directories[0], metric)
    text = FORMATS[format_.value][1](found)
    if out is None:
        print(text, end="")
    else:
        write_atomically(out, text.encode())


def _show_side_by_side(directories: list[Path], page: Path, as_json: bool, metric: str) -> None:
    from rich.text import Text

    from fedbn_simulations.report.page import write_side_by_side
    from fedbn_simulations.report.terminal import frame_table
    from fedbn_simulations.results.formatting import capitalize, metric_title
    from fedbn_simulations.results.summary import answer

    found = write_side_by_side(directories, page, metric)
    if as_json:
        frames = {"matrix": found.long(), "differences": found.differences()}
        tables = {name: json.loads(frame.to_json(orient="records")) for name, frame in frames.items()}
        answers = {name: answer(comparison) for name, comparison in found.comparisons.items()}
        print(json.dumps({"answers": answers} | tables | {"report": str(page)}, indent=1))
        return
    for name, comparison in found.comparisons.items():
        console.print(Text(f"{name}: {answer(comparison)}"), "")
    first, name = next(iter(found.comparisons)), capitalize(metric_title(found.metric))
    for title, frame in (
        (f"{name}, mean over users [95 % interval]", found.wide()),
        (f"{name} minus that of {first}, user by user [95 % interval]", found.differences_wide()),
        ("Settings that differ", found.settings()),
    ):
        if not frame.empty:
            console.print(frame_table(frame, title), "")
    console.print(f"report: {page.resolve()}", soft_wrap=True)

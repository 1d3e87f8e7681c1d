"""``python -m benchmarks``: measure the engines, write a table and a plot, and warn about regressions."""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast, get_args

from matplotlib.figure import Figure

from fedbn.stacked.memory import collect_garbage_rarely, keep_freed_memory
from fedbn_simulations.report.documents import replace_block
from fedbn_simulations.report.style import INK, MARKERS, PAGE_WIDTH, PALETTE, direction, small_png, styled
from fedbn_simulations.results.formatting import markdown_table

STORED = Path(__file__).parent / "stored.json"
TOLERANCE = 1.5
"""Factor above the stored ratio that counts as a regression. Run-to-run noise is smaller than this."""


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and report. Regressions only warn: other jobs on the machine may be the cause."""
    keep_freed_memory()
    from benchmarks.measure import measure
    from fedbn.stacked.executors import Executor, parse_executor

    collect_garbage_rarely()

    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument(
        "--executors", default="exact,auto", help=f"comma-separated, of {', '.join(get_args(Executor))}"
    )
    parser.add_argument("--rounds", type=int, default=7, help="number of rounds; the first and the last are not timed")
    parser.add_argument("--most", type=int, default=10_000, help="largest number of clients of the scaling curve")
    parser.add_argument("--ray", action="store_true", help="also measure Flower's Ray simulation")
    parser.add_argument(
        "--peers", metavar="PYTHON", help="also measure pfl-research, with this interpreter (make bench-peers)"
    )
    parser.add_argument("--out", type=Path, default=Path("results/benchmarks"), help="output directory")
    parser.add_argument("--into", type=Path, help="also update the table and the plot of this document")
    parser.add_argument("--stored", action="store_true", help="measure nothing, and show the stored baseline")
    parser.add_argument("--store", action="store_true", help="store these ratios as the new baseline")
    args = parser.parse_args(argv)
    executors = [parse_executor(t) for t in args.executors.split(",")]
    log = partial(print, file=sys.stderr)
    stored = json.loads(STORED.read_text(encoding="utf-8")) if STORED.exists() else {"ratios": []}
    result = stored if args.stored else measure(executors, args.rounds, args.most, args.ray, args.peers, log)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "benchmarks.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    (args.out / "benchmarks.png").write_bytes(small_png(draw(result)))
    print(table(result))
    if args.into:
        update_document(result, args.out / "benchmarks.png", args.into)
    for line in slower(result, stored):
        print(f"warning: {line}", file=sys.stderr)
    if args.store:
        STORED.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


def blocks(result: dict[str, Any]) -> dict[str, str]:
    """Markdown tables by block name: ``speed`` has the rounds, ``speed-more`` everything else."""
    rows = [
        {
            "workload": row["workload"],
            "engine": row["engine"],
            "plain loop ms": f"{1e3 * row['loop']:.1f}",
            "round ms": f"{1e3 * row['seconds']:.1f}",
            "ratio": f"{row['ratio']:.3f}",
            "ratio of medians": f"{row['ratio of medians']:.3f}",
            "ratio of CPU time": "" if row["ratio of CPU time"] is None else f"{row['ratio of CPU time']:.3f}",
            "target": "" if row["target"] is None else f"{row['target']}",
        }
        for row in cast(list[dict[str, Any]], result["ratios"])
    ]
    scale = [
        {
            "clients": f"{row['clients']}",
            "steps per client": f"{row['steps']}",
            "plain loop ms": f"{1e3 * row['loop']:.1f}",
            "round ms": f"{1e3 * row['seconds']:.1f}",
            "ratio": f"{row['seconds'] / row['loop']:.3f}",
            "µs per step": f"{1e6 * row['seconds'] / (row['clients'] * row['steps']):.0f}",
            "data MB": f"{row['data'] / 1e6:.0f}",
            "memory MB": f"{row['memory'] / 1e6:.0f}",
        }
        for row in result["scale"]
    ]
    single = [
        {"what": f"evaluation of {name}'s users, stacked, ratio to one by one", "measured": f"{share:.2f}"}
        for name, share in result["evaluation"].items()
    ]
    single += [{"what": f"bank, {name}", "measured": f"{value:.2f}"} for name, value in result["bank"].items()]
    single += [
        {"what": f"startup of `{name}`", "measured": f"{value:.2f} s"} for name, value in result["starts"].items()
    ]
    return {"speed": markdown_table(rows), "speed-more": markdown_table(scale) + "\n" + markdown_table(single)}


def table(result: dict[str, Any]) -> str:
    """All tables as one text."""
    return "\n".join(blocks(result).values())


def update_document(result: dict[str, Any], plot: Path, document: Path) -> None:
    """Update the blocks ``speed`` and ``speed-more`` of a document, and the plot that it shows.

    Raises:
        UserError: the document or its markers are missing.
    """
    text = document.read_text(encoding="utf-8") if document.exists() else ""
    for name, content in blocks(result).items():
        if name == "speed" or f"<!-- begin {name} -->" in text:
            replace_block(document, name, content)
    for image in re.findall(r"!\[.*?\]\((.*?speed\.png)\)", text):
        shutil.copy(plot, document.parent / image)


def slower(result: dict[str, Any], stored: dict[str, Any]) -> list[str]:
    """Warnings about ratios that exceed the stored ones by more than `TOLERANCE`.

    >>> row = {"workload": "W1", "engine": "grid:auto", "ratio": 0.5}
    >>> slower({"ratios": [row | {"ratio": 0.9}]}, {"ratios": [row]})
    ['W1 on grid:auto takes 0.900 times the plain loop; stored: 0.500']
    >>> slower({"ratios": [row]}, {"ratios": [row]})
    []
    """
    baseline = {(row["workload"], row["engine"]): row["ratio"] for row in stored["ratios"]}
    return [
        f"{row['workload']} on {row['engine']} takes {row['ratio']:.3f} times the plain loop; "
        f"stored: {baseline[row['workload'], row['engine']]:.3f}"
        for row in result["ratios"]
        if row["ratio"] > TOLERANCE * baseline.get((row["workload"], row["engine"]), float("inf"))
    ]


@styled
def draw(result: dict[str, Any]) -> Figure:
    """A dot per workload and engine, with the targets, and the scaling curve."""
    figure = Figure(figsize=(PAGE_WIDTH, 2.9), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    rows = sorted(cast(list[dict[str, Any]], result["ratios"]), key=lambda row: str(row["workload"]))
    engines = list(dict.fromkeys(row["engine"] for row in rows))
    for i, engine in enumerate(engines):
        dots = [(row["ratio"], y) for y, row in enumerate(rows) if row["engine"] == engine]
        left.plot(*zip(*dots, strict=True), linestyle="", marker=MARKERS[i], color=PALETTE[i], zorder=3)
    targets = [(row["target"], y) for y, row in enumerate(rows) if row["target"] is not None]
    if targets:
        left.plot(*zip(*targets, strict=True), linestyle="", marker="|", markersize=10, color=INK, label="target")
        left.legend(loc="lower left", handletextpad=0.2)
    left.axvline(1, linestyle=":", color=INK, linewidth=0.8)
    left.set_yticks(range(len(rows)), [f"{row['workload']} {row['engine']}" for row in rows])
    left.set_ylim(len(rows) - 0.5, -0.5)
    left.set_xscale("log")
    left.set_xticks([0.05, 0.1, 0.2, 0.5, 1, 2], ["0.05", "0.1", "0.2", "0.5", "1", "2"])
    left.minorticks_off()
    left.grid()
    left.set_title("Time of a round")
    left.set_xlabel(f"ratio to the plain PyTorch loop ({direction(False)})")
    clients = [row["clients"] for row in result["scale"]]
    for key, label, line in (
        ("loop", "plain loop", {"color": INK, "linestyle": "--"}),
        ("seconds", "grid:stacked", {}),
    ):
        right.loglog(
            clients, [row[key] for row in result["scale"]], marker="o", label=label, **{"color": PALETTE[0], **line}
        )
    right.set_title("Constant total work")
    right.set_xlabel("clients")
    right.set_ylabel(f"seconds per round ({direction(False)})")
    right.set_ylim(bottom=0.01)
    for axis in (right.xaxis, right.yaxis):
        axis.set_major_formatter("{x:g}")
    right.grid()
    right.legend()
    return figure


if __name__ == "__main__":
    sys.exit(main())

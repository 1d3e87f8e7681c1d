"""``python -m benchmarks``: measure the engines, write tables and a plot, and warn about regressions."""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from fedbn.stacked.executors import available_cores
from fedbn.stacked.memory import collect_garbage_rarely, keep_freed_memory
from fedbn_simulations.report.documents import replace_block
from fedbn_simulations.report.style import INK, MARKERS, PALETTE, direction, small_png, styled
from fedbn_simulations.results.formatting import markdown_table

STORED = Path(__file__).parent / "stored.json"
TOLERANCE = 1.5
"""Factor above the stored ratio that counts as a regression. Run-to-run noise is smaller than this."""

Rows = list[dict[str, Any]]


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and report. Regressions only warn: other jobs on the machine may be the cause."""
    keep_freed_memory()
    from benchmarks.measure import measure, measure_quick, other_systems

    collect_garbage_rarely()

    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument(
        "--threads",
        default=str(min(2, available_cores())),
        help="comma-separated; peers and the rest use the last, e.g. 1,2",
    )
    parser.add_argument("--rounds", type=int, default=3, help="smallest number of measured rounds")
    parser.add_argument("--most", type=int, default=10_000, help="largest number of clients of the scaling curve")
    parser.add_argument("--ray", action="store_true", help="also measure Flower's Ray simulation")
    parser.add_argument(
        "--peers", metavar="PYTHON", help="also measure JAX and pfl-research, with this interpreter (make bench-peers)"
    )
    parser.add_argument("--pfllib", metavar="CLONE", type=Path, help="also measure PFLlib, in this clone")
    parser.add_argument("--out", type=Path, default=Path("results/benchmarks"), help="output directory")
    parser.add_argument("--into", type=Path, help="also update the tables of this document, and the plot beside it")
    parser.add_argument("--quick", action="store_true", help="only two small workloads, and only warn (CI)")
    parser.add_argument("--stored", action="store_true", help="measure nothing, and show the stored baseline")
    parser.add_argument("--store", action="store_true", help="store these ratios as the new baseline")
    args = parser.parse_args(argv)
    threads = [int(count) if count.isdigit() else 0 for count in args.threads.split(",")]
    if not 1 <= min(threads) <= max(threads) <= available_cores():
        parser.error(f"--threads {args.threads}: choose from 1 to {available_cores()}, the cores of this process")
    if args.peers and shutil.which(args.peers) is None:
        parser.error(f"--peers {args.peers}: there is no such interpreter; make bench-peers creates one")
    if args.pfllib and not (args.pfllib / "system" / "flcore").is_dir():
        parser.error(f"--pfllib {args.pfllib}: this directory is not a clone of PFLlib, it has no system/flcore")
    log = partial(print, file=sys.stderr)
    stored = json.loads(STORED.read_text(encoding="utf-8"))
    if args.quick:
        result = measure_quick(log)
        print(markdown_table([shown(row) for row in result["quick"]]))
        warn(slower(result, stored))
        return 0
    peers = other_systems(args.peers, args.pfllib and args.pfllib.resolve(), args.ray)
    result = stored if args.stored else measure(peers, threads, args.rounds, args.most, log)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "benchmarks.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    (args.out / "speed.png").write_bytes(small_png(draw(result["ratios"])))
    print("\n".join(blocks(result).values()))
    if args.into:
        update_document(result, args.out / "speed.png", args.into)
    warn(slower(result, stored))
    if args.store:
        STORED.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


def shown(row: dict[str, Any]) -> dict[str, str]:
    """A row of `benchmarks.measure.compare` as text."""
    start = {
        "threads": f"{row['threads']}",
        "workload": row["workload"],
        "system": row["system"],
        "plain loop ms": f"{1e3 * row['loop']:.1f}",
    }
    numbers = ("round ms", "ratio", "ratio of medians", "ratio of CPU time", "target")
    if "reason" in row:
        return start | dict.fromkeys(numbers, "") | {"round ms": f"not measured: {row['reason']}"}
    ratios = {name: f"{row[name]:.3f}" for name in numbers[1:4]}
    return start | {"round ms": f"{1e3 * row['seconds']:.1f}"} | ratios | {"target": f"{row['target'] or ''}"}


def blocks(result: dict[str, Any]) -> dict[str, str]:
    """Markdown tables by block name: rounds, everything else, and an estimate of rounds of 1,000 clients."""
    scale = [
        {
            "threads": f"{row['threads']}",
            "clients": f"{row['clients']}",
            "steps per client": f"{row['steps']}",
            "plain loop ms": f"{1e3 * row['loop']:.1f}",
            "round ms": f"{1e3 * row['seconds']:.1f}",
            "ratio": f"{row['ratio']:.3f}",
            "ratio of CPU time": f"{row['ratio of CPU time']:.3f}",
            "CPU µs per step": f"{1e6 * row['cpu'] / (row['clients'] * row['steps']):.0f}",
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
    return {
        "speed": markdown_table([shown(row) for row in result["ratios"]]),
        "speed-more": markdown_table(scale) + "\n" + markdown_table(single),
        "million": markdown_table(million(result)),
    }


def million(result: dict[str, Any], clients: int = 1_000, steps: int = 10) -> list[dict[str, str]]:
    """Estimated time of rounds of W3 with many clients, by system, from the measured time per step."""
    measured = [row for row in result["ratios"] if row["workload"] == "W3" and "reason" not in row]
    rows = [row for row in result["scale"] if row["clients"] == clients][-1:]
    for system in ("grid:exact", "Flower on Ray"):
        rows += [row for row in measured if row["system"] == system][-1:]
    table = []
    for row in rows:
        step = row["seconds"] / (row["clients"] * row["steps"])
        table.append(
            {
                "system": row["system"],
                "measured": f"{row['clients']:,} clients x {row['steps']} steps in {1e3 * row['seconds']:.0f} ms",
                "cost of a step": f"{1e6 * step:.0f} µs",
                f"round (`K` = {clients:,}, `S` = {steps})": f"{clients * steps * step:.2f} s",
                "1,000 rounds": f"{1_000 * clients * steps * step / 60:.0f} min",
            }
        )
    return table


def update_document(result: dict[str, Any], plot: Path, document: Path) -> None:
    """Update those of `blocks` that a document has, and the plot that it shows.

    Raises:
        UserError: the document is missing, or it has none of them.
    """
    text = document.read_text(encoding="utf-8") if document.exists() else ""
    contents = blocks(result)
    for name in [name for name in contents if f"<!-- begin {name} -->" in text] or ["speed"]:
        replace_block(document, name, contents[name])
    for image in re.findall(r"!\[.*?\]\((.*?speed\.png)\)", text):
        shutil.copy(plot, document.parent / image)


def slower(result: dict[str, Any], stored: dict[str, Any]) -> list[str]:
    """Sentences about ratios of CPU time that exceed the stored ones by more than `TOLERANCE`.

    >>> row = {"threads": 1, "workload": "W1", "system": "grid:auto", "ratio of CPU time": 0.5}
    >>> slower({"quick": [row | {"ratio of CPU time": 0.9}]}, {"quick": [row]})
    ['W1 on grid:auto takes 0.900 times the CPU time of the plain loop (threads: 1); stored: 0.500']
    >>> slower({"quick": [row]}, {"quick": [row]})
    []
    """

    def ratios(found: dict[str, Any]) -> dict[tuple[str, str, int], float]:
        rows: Rows = [*found.get("ratios", ()), *found.get("quick", ())]
        measured = [row for row in rows if "ratio of CPU time" in row]
        return {(row["workload"], row["system"], row["threads"]): row["ratio of CPU time"] for row in measured}

    baseline = ratios(stored)
    return [
        f"{workload} on {system} takes {ratio:.3f} times the CPU time of the plain loop (threads: {threads}); "
        f"stored: {baseline[workload, system, threads]:.3f}"
        for (workload, system, threads), ratio in ratios(result).items()
        if ratio > TOLERANCE * baseline.get((workload, system, threads), float("inf"))
    ]


def warn(lines: Sequence[str]) -> None:
    """Print warnings, which GitHub shows beside the checks of a change."""
    for line in lines:
        print(f"::warning::{line}" if "GITHUB_ACTIONS" in os.environ else f"warning: {line}", file=sys.stderr)


@styled
def draw(rows: Rows) -> Figure:
    """A line of dots per system, one per workload, for the largest number of threads; readable on a phone."""
    measured = [r for r in rows if r["threads"] == max(row["threads"] for row in rows) and "reason" not in r]
    systems = list(dict.fromkeys(row["system"] for row in measured))
    workloads = sorted({row["workload"] for row in measured})
    figure = Figure(figsize=(3.9, 1.25 + 0.34 * len(systems)), layout="constrained")
    axes = figure.subplots()
    for i, workload in enumerate(workloads):
        shift = 0.2 * (i - (len(workloads) - 1) / 2)
        dots = [(row["ratio"], systems.index(row["system"]) + shift) for row in measured if row["workload"] == workload]
        axes.plot(*zip(*dots, strict=True), linestyle="", marker=MARKERS[i], color=PALETTE[i], label=workload)
    axes.axvline(1, linestyle=":", color=INK, linewidth=1)
    axes.set_yticks(range(len(systems)), [system.replace("grid:", "fedbn ") for system in systems])
    axes.set_ylim(len(systems) - 0.5, -0.5)
    axes.hlines(
        [y + 0.5 for y in range(len(systems) - 1)],
        0,
        1,
        transform=axes.get_yaxis_transform(),
        color=INK,
        alpha=0.15,
        linewidth=0.5,
    )
    axes.tick_params(axis="y", length=0)
    axes.set_xscale("log")
    ticks = [0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    ratios = [row["ratio"] for row in measured]
    axes.set_xlim(min(0.05, *ratios) / 1.3, max(1.0, *ratios) * 1.3)
    axes.minorticks_off()
    axes.grid(axis="x")
    figure.supxlabel(f"time of a round, plain PyTorch loop = 1 ({direction(False)})")
    figure.legend(loc="outside upper center", ncols=len(workloads), handletextpad=0.1, columnspacing=1.2)
    return figure


if __name__ == "__main__":
    sys.exit(main())

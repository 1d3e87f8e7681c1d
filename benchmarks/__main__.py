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

from fedbn.stacked.memory import collect_garbage_rarely, keep_freed_memory
from fedbn_simulations.report.documents import replace_block
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
    parser.add_argument("--store", action="store_true", help="store these ratios as the new baseline")
    args = parser.parse_args(argv)
    executors = [parse_executor(t) for t in args.executors.split(",")]
    log = partial(print, file=sys.stderr)
    result = measure(executors, args.rounds, args.most, args.ray, args.peers, log)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "benchmarks.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    draw(result, args.out / "benchmarks.png")
    print(table(result))
    if args.into:
        update_document(result, args.out / "benchmarks.png", args.into)
    stored = json.loads(STORED.read_text(encoding="utf-8")) if STORED.exists() else {"ratios": []}
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


def draw(result: dict[str, Any], path: Path) -> None:
    """Plot the ratios with their targets, and the scaling curve."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
    rows = sorted(cast(list[dict[str, Any]], result["ratios"]), key=lambda row: str(row["workload"]))
    positions = range(len(rows))
    left.barh(list(positions), [row["ratio"] for row in rows])
    targets = {y: row["target"] for y, row in enumerate(rows) if row["target"] is not None}
    left.scatter(list(targets.values()), list(targets), marker="|", s=200, color="black", label="target")
    left.axvline(1, linestyle=":", color="gray")
    left.set_yticks(list(positions), [f"{row['workload']} {row['engine']}" for row in rows])
    left.invert_yaxis()
    left.set_xscale("log")
    left.set_xlabel("time of a round, ratio to the plain PyTorch loop")
    figure.legend(loc="outside upper left")
    for key, label in (("loop", "plain loop"), ("seconds", "engine")):
        clients = [row["clients"] for row in result["scale"]]
        right.loglog(clients, [row[key] for row in result["scale"]], marker="o", label=label)
    right.set_xlabel("clients, at constant total work")
    right.set_ylabel("seconds per round")
    right.set_ylim(bottom=0.01)
    right.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    sys.exit(main())

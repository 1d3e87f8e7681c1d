"""``python -m benchmarks``: measure, print, draw, write, and warn where it has become slower."""

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
from simulations.report.documents import markdown, replace_block

STORED = Path(__file__).parent / "stored.json"
TOLERANCE = 1.5
"""A ratio this many times the stored one is a regression; machines differ less than that from run to run."""


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and report; 0 also where something has become slower, since other jobs may have been to blame."""
    keep_freed_memory()
    from benchmarks.measure import measure
    from fedbn.stacked.executors import Executor, parse_executor

    collect_garbage_rarely()

    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument(
        "--executors", default="exact,auto", help=f"comma-separated, of {', '.join(get_args(Executor))}"
    )
    parser.add_argument("--rounds", type=int, default=7, help="rounds timed; the first and the last do not count")
    parser.add_argument("--most", type=int, default=10_000, help="most clients of the scale curve")
    parser.add_argument("--ray", action="store_true", help="Flower's own simulation beside it")
    parser.add_argument(
        "--peers", metavar="PYTHON", help="an interpreter with pfl, to measure it too (make bench-peers)"
    )
    parser.add_argument("--out", type=Path, default=Path("results/benchmarks"), help="directory of JSON and picture")
    parser.add_argument("--into", type=Path, help="document that gets table and picture, between its markers")
    parser.add_argument("--store", action="store_true", help="keep these ratios to compare with from now on")
    chosen = parser.parse_args(argv)
    executors = [parse_executor(t) for t in chosen.executors.split(",")]
    say = partial(print, file=sys.stderr)
    result = measure(executors, chosen.rounds, chosen.most, chosen.ray, chosen.peers, say)
    chosen.out.mkdir(parents=True, exist_ok=True)
    (chosen.out / "benchmarks.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    draw(result, chosen.out / "benchmarks.png")
    print(table(result))
    if chosen.into:
        update_document(result, chosen.out / "benchmarks.png", chosen.into)
    stored = json.loads(STORED.read_text(encoding="utf-8")) if STORED.exists() else {"ratios": []}
    for line in slower(result, stored):
        print(f"warning: {line}", file=sys.stderr)
    if chosen.store:
        STORED.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


def blocks(result: dict[str, Any]) -> dict[str, str]:
    """The numbers as Markdown: rounds beside the bare loop, and everything else."""
    rows = [
        {
            "workload": row["workload"],
            "engine": row["engine"],
            "bare loop ms": f"{1e3 * row['loop']:.1f}",
            "round ms": f"{1e3 * row['seconds']:.1f}",
            "share of the loop": f"{row['ratio']:.3f}",
            "of medians": f"{row['ratio of medians']:.3f}",
            "of CPU time": "" if row["ratio of CPU time"] is None else f"{row['ratio of CPU time']:.3f}",
            "target": "" if row["target"] is None else f"{row['target']}",
        }
        for row in cast(list[dict[str, Any]], result["ratios"])
    ]
    scale = [
        {
            "clients": f"{row['clients']}",
            "steps each": f"{row['steps']}",
            "bare loop ms": f"{1e3 * row['loop']:.1f}",
            "round ms": f"{1e3 * row['seconds']:.1f}",
            "share of the loop": f"{row['seconds'] / row['loop']:.3f}",
            "µs a step": f"{1e6 * row['seconds'] / (row['clients'] * row['steps']):.0f}",
            "data MB": f"{row['data'] / 1e6:.0f}",
            "memory MB": f"{row['memory'] / 1e6:.0f}",
        }
        for row in result["scale"]
    ]
    single = [
        {"what": f"evaluating {name}'s users side by side, ratio to one by one", "measured": f"{share:.2f}"}
        for name, share in result["evaluation"].items()
    ]
    single += [{"what": f"bank, {name}", "measured": f"{value:.2f}"} for name, value in result["bank"].items()]
    single += [
        {"what": f"start of {name}", "measured": f"{seconds:.2f} s"} for name, seconds in result["starts"].items()
    ]
    return {"speed": markdown(rows), "speed-more": markdown(scale) + "\n" + markdown(single)}


def table(result: dict[str, Any]) -> str:
    """All numbers as text."""
    return "\n".join(blocks(result).values())


def update_document(result: dict[str, Any], picture: Path, document: Path) -> None:
    """Put the numbers between a document's markers ``speed`` and ``speed-more``, and the picture where it is shown.

    Raises:
        UserError: the document or its markers are missing.
    """
    text = document.read_text(encoding="utf-8") if document.exists() else ""
    for name, content in blocks(result).items():
        if name == "speed" or f"<!-- begin {name} -->" in text:
            replace_block(document, name, content)
    for shown in re.findall(r"!\[.*?\]\((.*?speed\.png)\)", text):
        shutil.copy(picture, document.parent / shown)


def slower(result: dict[str, Any], stored: dict[str, Any]) -> list[str]:
    """In words, what has become slower against the loop than what is stored.

    >>> row = {"workload": "W1", "engine": "grid:auto", "ratio": 0.5}
    >>> slower({"ratios": [row | {"ratio": 0.9}]}, {"ratios": [row]})
    ['W1 on grid:auto takes 0.900 of the bare loop; stored: 0.500']
    >>> slower({"ratios": [row]}, {"ratios": [row]})
    []
    """
    before = {(row["workload"], row["engine"]): row["ratio"] for row in stored["ratios"]}
    return [
        f"{row['workload']} on {row['engine']} takes {row['ratio']:.3f} of the bare loop; "
        f"stored: {before[row['workload'], row['engine']]:.3f}"
        for row in result["ratios"]
        if row["ratio"] > TOLERANCE * before.get((row["workload"], row["engine"]), float("inf"))
    ]


def draw(result: dict[str, Any], path: Path) -> None:
    """Shares of the loop's time beside their targets, and the scale curve."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
    rows = sorted(cast(list[dict[str, Any]], result["ratios"]), key=lambda row: str(row["workload"]))
    places = range(len(rows))
    left.barh(list(places), [row["ratio"] for row in rows])
    targets = {place: row["target"] for place, row in zip(places, rows, strict=True) if row["target"] is not None}
    left.scatter(list(targets.values()), list(targets), marker="|", s=200, color="black", label="target")
    left.axvline(1, linestyle=":", color="gray")
    left.set_yticks(list(places), [f"{row['workload']} {row['engine']}" for row in rows])
    left.invert_yaxis()
    left.set_xscale("log")
    left.set_xlabel("time of a round, share of the bare loop's")
    figure.legend(loc="outside upper left")
    for what, label in (("loop", "bare loop"), ("seconds", "engine")):
        clients = [row["clients"] for row in result["scale"]]
        right.loglog(clients, [row[what] for row in result["scale"]], marker="o", label=label)
    right.set_xlabel("clients, at constant work")
    right.set_ylabel("seconds a round")
    right.set_ylim(bottom=0.01)
    right.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    sys.exit(main())

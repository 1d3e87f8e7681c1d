"""``python -m benchmarks``: measure, print, draw, write, and warn where it has become slower."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast, get_args

from fedbn.stacked.memory import keep_freed_memory, leave_alone_what_is_loaded

STORED = Path(__file__).parent / "stored.json"
TOLERANCE = 1.5
"""A ratio this many times the stored one is a regression; machines differ less than that from run to run."""


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and report; 0 also where something has become slower, since other jobs may have been to blame."""
    keep_freed_memory()
    from benchmarks.measure import measure
    from fedbn.stacked.tiers import Tier, parse_tier

    leave_alone_what_is_loaded()

    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--tiers", default="exact,auto", help=f"comma-separated, of {', '.join(get_args(Tier))}")
    parser.add_argument("--rounds", type=int, default=7, help="rounds timed; the first and the last do not count")
    parser.add_argument("--most", type=int, default=10_000, help="most clients of the scale curve")
    parser.add_argument("--ray", action="store_true", help="Flower's own simulation beside it")
    parser.add_argument("--out", type=Path, default=Path("results/benchmarks"), help="directory of JSON and picture")
    parser.add_argument("--store", action="store_true", help="keep these ratios to compare with from now on")
    chosen = parser.parse_args(argv)
    tiers = [parse_tier(t) for t in chosen.tiers.split(",")]
    result = measure(tiers, chosen.rounds, chosen.most, chosen.ray, say=lambda line: print(line, file=sys.stderr))
    chosen.out.mkdir(parents=True, exist_ok=True)
    (chosen.out / "benchmarks.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    draw(result, chosen.out / "benchmarks.png")
    print(table(result))
    stored = json.loads(STORED.read_text(encoding="utf-8")) if STORED.exists() else {"ratios": []}
    for line in slower(result, stored):
        print(f"warning: {line}", file=sys.stderr)
    if chosen.store:
        STORED.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


def table(result: dict[str, Any]) -> str:
    """All numbers as text."""
    lines = [
        "| workload | engine | bare loop ms | round ms | share of the loop | of medians | of CPU time | target |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in cast(list[dict[str, Any]], result["ratios"]):
        loop, seconds = (f"{1e3 * row[k]:.1f}" for k in ("loop", "seconds"))
        cpu = row["ratio of CPU time"]
        shares = f"{row['ratio']:.3f} | {row['ratio of medians']:.3f} | {'' if cpu is None else f'{cpu:.3f}'}"
        lines.append(f"| {row['workload']} | {row['engine']} | {loop} | {seconds} | {shares} | {row['target']} |")
    lines += ["", "| clients | steps each | round ms | µs a step | data MB | memory MB |", "|---|---|---|---|---|---|"]
    for row in result["scale"]:
        each = 1e6 * row["seconds"] / (row["clients"] * row["steps"])
        sizes = f"{row['data'] / 1e6:.0f} | {row['memory'] / 1e6:.0f}"
        lines.append(f"| {row['clients']} | {row['steps']} | {1e3 * row['seconds']:.1f} | {each:.0f} | {sizes} |")
    lines += ["", *(f"bank, {name}: {value:.2f}" for name, value in result["bank"].items())]
    lines += ["", *(f"{name}: {seconds:.2f} s" for name, seconds in result["starts"].items())]
    return "\n".join(lines)


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
    rows = cast(list[dict[str, Any]], result["ratios"])
    places = range(len(rows))
    left.barh(list(places), [row["ratio"] for row in rows])
    left.scatter([row["target"] for row in rows], list(places), marker="|", s=200, color="black", label="target")
    left.axvline(1, linestyle=":", color="gray")
    left.set_yticks(list(places), [f"{row['workload']} {row['engine']}" for row in rows])
    left.set_xscale("log")
    left.set_xlabel("time of a round, share of the bare loop's")
    left.legend()
    right.loglog([row["clients"] for row in result["scale"]], [row["seconds"] for row in result["scale"]], marker="o")
    right.set_xlabel("clients, at constant work")
    right.set_ylabel("seconds a round")
    figure.savefig(path, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    sys.exit(main())

"""Time rounds of a workload in the engines, beside the bare loop."""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice, pairwise
from pathlib import Path

import torch

from benchmarks.workloads import WORKLOADS, Workload, bare_loop
from clients.app import app as client_app
from fedbn.models import build
from fedbn.online import personalize, rule
from fedbn.run import Run
from fedbn.setting import setting
from fedbn.stacked.tiers import Tier
from simulations.app import Listener, conduct
from simulations.flower_compat import task_identity
from simulations.grid import InProcessGrid

SPEEDS = {"W1": 0.60, "W2": 0.40, "W3": 0.05}
"""The shares of the bare loop's time that a round is to take."""

COMMANDS = {
    "import fedbn": "import fedbn",
    "import fedbn.federation": "import fedbn.federation",
    "fedbn --help": "import sys; sys.argv = ['fedbn', '--help']; from simulations.cli import main; main()",
}


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """So many intra-op threads in this block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def loop_seconds(run: Run, rounds: int, threads: int = 2) -> float:
    """Median seconds of a round of the bare loop, the first left out."""
    with torch_threads(threads):
        return statistics.median(list(islice(bare_loop(setting(run)), rounds))[1:])


def grid_seconds(run: Run, tier: Tier) -> float:
    """Median seconds of a round over the grid - messages, state, aggregation and metrics - the first left out.

    The last round, which evaluates, is left out too: the bare loop does not.
    """
    grid = InProcessGrid(client_app, len(setting(run).population.users), {"run": run.to_json()}, tier=tier)
    times = [time.perf_counter()]
    with torch_threads(1), task_identity(grid.run.run_id):
        conduct(grid, run, Listener(on_round=lambda number, outcome: times.append(time.perf_counter())))
    return statistics.median([b - a for a, b in pairwise(times)][1:-1])


def ratios(folder: Path, tiers: Sequence[Tier], rounds: int, works: Sequence[Workload]) -> list[dict[str, object]]:
    """One row a workload and tier; the bare loop is timed before and after each, since machines drift."""
    rows: list[dict[str, object]] = []
    for work in works:
        run = work.run(folder, rounds)
        before = loop_seconds(run, rounds)
        for tier in tiers:
            seconds = grid_seconds(run, tier)
            after = loop_seconds(run, rounds)
            loop = (before + after) / 2
            rows.append(
                {
                    "workload": work.name,
                    "engine": f"grid:{tier}",
                    "loop": loop,
                    "seconds": seconds,
                    "ratio": seconds / loop,
                    "target": SPEEDS[work.name],
                }
            )
            before = after
    return rows


def ray_rows(folder: Path, rounds: int, works: Sequence[Workload]) -> list[dict[str, object]]:
    """The same over Flower's own simulation: seconds a round of a run, starting Ray left out by a run of one round."""
    from simulations.engines import execute

    rows: list[dict[str, object]] = []
    for work in works:
        spent = {}
        for number in (1, rounds):
            began = time.perf_counter()
            execute(work.run(folder, number), "ray")
            spent[number] = time.perf_counter() - began
        seconds = (spent[rounds] - spent[1]) / (rounds - 1)
        loop = loop_seconds(work.run(folder, rounds), rounds)
        rows.append(
            {
                "workload": work.name,
                "engine": "ray",
                "loop": loop,
                "seconds": seconds,
                "ratio": seconds / loop,
                "target": SPEEDS[work.name],
            }
        )
    return rows


def scale(folder: Path, tier: Tier, rounds: int, most: int) -> list[dict[str, object]]:
    """Seconds a round of W3 with more and more clients that together take ever the same number of steps."""
    rows: list[dict[str, object]] = []
    small = WORKLOADS[2]
    clients = 10
    while clients <= most:
        # 10,000 clients cannot take fewer than a step each: the work is what the largest round needs.
        work = Workload("W3", small.shape, small.classes, small.model, clients, max(1, most // clients), small.batch)
        rows.append({"clients": clients, "steps": work.steps, "seconds": grid_seconds(work.run(folder, rounds), tier)})
        clients *= 10
    return rows


def bank(users: int = 10_000, rows: int = 256, repeats: int = 30) -> dict[str, float]:
    """Costs of the online bank on the sensor network, one thread: a batch of ``rows`` rows, all of different users.

    Returns:
        Ratios to a stock evaluation pass of the same rows (medians of interleaved repeats), and bytes per user.
    """
    model = build("har-cnn", (6, 128), 6, seed=0).eval()
    x = torch.randn(rows, 6, 128, generator=torch.Generator().manual_seed(0))
    net = personalize(model, rule("pseudo:n0=64"), capacity=users)
    crowd = torch.arange(users)
    with torch_threads(1), torch.no_grad():
        for part in crowd.split(rows):
            net(x[: len(part)], user=part)
        ids = crowd[:rows]

        def predict_only() -> None:
            with net.frozen():
                net.predict(x, user=ids)

        ways = {"stock": lambda: model(x), "predict": predict_only, "predict and commit": lambda: net(x, user=ids)}
        times: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(repeats):
            for name, way in ways.items():
                began = time.perf_counter()
                way()
                times[name].append(time.perf_counter() - began)
    stock = statistics.median(times.pop("stock"))
    costs = {f"{name}, ratio to stock": statistics.median(spent) / stock for name, spent in times.items()}
    return costs | {"state, bytes per user": float(len(net.state(0).to_bytes()))}


def starts() -> dict[str, float]:
    """Seconds of fresh processes that import or say what they can."""
    out = {}
    for name, code in COMMANDS.items():
        times = []
        for _ in range(3):
            began = time.perf_counter()
            subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
            times.append(time.perf_counter() - began)
        out[name] = min(times)
    return out


def measure(tiers: Sequence[Tier], rounds: int, most: int, ray: bool) -> dict[str, object]:
    """Everything, as plain values."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = ratios(folder, tiers, rounds, WORKLOADS)
        if ray:
            rows += ray_rows(folder, rounds, WORKLOADS)
        return {
            "rounds": rounds,
            "torch": torch.__version__,
            "ratios": rows,
            "scale": scale(folder, "stacked", rounds, most),
            "bank": bank(),
            "starts": starts(),
        }

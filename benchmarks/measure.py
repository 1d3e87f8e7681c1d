"""Measure rounds of the engines and of other simulators, and compare them with the plain PyTorch loop."""

from __future__ import annotations

import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from benchmarks.rounds import ProcessEnded, RoundProcess
from benchmarks.workloads import QUICK, WORKLOADS, Workload
from fedbn.config import Precision
from fedbn.federation.metrics import COLUMNS
from fedbn.federation.server import global_columns, served_users
from fedbn.federation.setup import build_context
from fedbn.models import build
from fedbn.nn.threads import torch_threads
from fedbn.online import personalize
from fedbn.online.rules.base import rule
from fedbn.stacked.executors import ClientExecutor
from fedbn_clients.jobs import Evaluate

Row = dict[str, object]

TARGETS = {
    (1, "W1", "grid:auto"): 0.87,
    (1, "W2", "grid:auto"): 0.70,
    (1, "W3", "grid:auto"): 0.06,
    (1, "W4", "grid:auto"): 0.72,
    (1, "W1", "grid:auto, bfloat16"): 0.56,
    (1, "W2", "grid:auto, bfloat16"): 0.60,
    (1, "W4", "grid:auto, bfloat16"): 0.52,
    (2, "W1", "grid:auto"): 0.60,
    (2, "W2", "grid:auto"): 0.40,
    (2, "W3", "grid:auto"): 0.05,
}
"""Target ratio of a round's time to the loop's, by threads, workload and system."""

COMMANDS = {
    "import fedbn": "import fedbn",
    "import fedbn.federation.loop": "import fedbn.federation.loop",
    "fedbn --help": "import sys; sys.argv = ['fedbn', '--help']; from fedbn_simulations.cli import main; main()",
}


@dataclass(frozen=True)
class System:
    """An engine or another simulator.

    Attributes:
        name: its name in tables.
        module: module of its `RoundProcess`.
        options: options of the process.
        python: interpreter of the process.
        precision: precision of training.
    """

    name: str
    module: str
    options: tuple[str, ...] = ()
    python: str = sys.executable
    precision: Precision = "float32"


OURS = (
    System("grid:auto", "benchmarks.grid", ("auto",)),
    System("grid:auto, bfloat16", "benchmarks.grid", ("auto",), precision="bfloat16"),
    System("grid:exact", "benchmarks.grid", ("exact",)),
)


def other_systems(python: str | None, pfllib: Path | None, ray: bool) -> list[System]:
    """Other simulators: those of an interpreter that has pfl and jax, PFLlib in a clone, and Flower on Ray."""
    peers: list[System] = []
    if python:
        peers += [System("JAX", "benchmarks.peers.jax_vmap", python=python)]
        peers += [System("pfl-research", "benchmarks.peers.pfl_research", python=python)]
    if pfllib:
        peers += [System("PFLlib", "benchmarks.peers.pfllib", (str(pfllib),))]
    if ray:
        peers += [System("Flower on Ray", "benchmarks.peers.ray")]
    return peers


def seconds_of(call: Callable[[], object]) -> float:
    """Wall-clock seconds of a call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def interleaved(calls: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Seconds of the repeats of several calls, which alternate."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            times[name].append(seconds_of(call))
    return times


@contextmanager
def restricted_to(cores: int) -> Iterator[None]:
    """Restrict this process, and the processes that it starts, to a number of cores."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(allowed)[:cores])
    try:
        yield
    finally:
        os.sched_setaffinity(0, allowed)


def compare(
    work: Workload, systems: Sequence[System], folder: Path, threads: int, rounds: int, seconds: float
) -> Iterator[Row]:
    """One row per system. Rounds of all systems and of the plain loop alternate.

    Args:
        work: the workload.
        systems: what to compare with the loop.
        folder: directory for data.
        threads: number of threads.
        rounds: smallest number of measured rounds, after one that is not measured.
        seconds: short rounds are repeated for so many seconds.
    """
    with ExitStack() as stack:
        stack.enter_context(restricted_to(threads))
        loop = stack.enter_context(RoundProcess("benchmarks.loop", work.run(folder), threads))
        processes = {
            system.name: stack.enter_context(
                RoundProcess(
                    system.module,
                    work.run(folder, precision=system.precision),
                    threads,
                    system.options,
                    system.python,
                )
            )
            for system in systems
        }
        reasons: dict[str, str] = {}
        start, number = math.inf, 0
        while number <= rounds or time.perf_counter() - start < seconds:
            loop.round()
            for name, process in processes.items():
                try:
                    process.round()
                except ProcessEnded as reason:
                    reasons.setdefault(name, str(reason))
            start, number = min(start, time.perf_counter()), number + 1
        for name, process in processes.items():
            yield row(work, name, threads, loop, process, reasons.get(name))


def row(
    work: Workload, system: str, threads: int, loop: RoundProcess, process: RoundProcess, reason: str | None
) -> Row:
    """One row of the table. The ratios use the fastest rounds, since other load on the machine only adds time."""
    start: Row = {"workload": work.name, "clients": work.clients, "steps": work.steps}
    start |= {"system": system, "threads": threads, "loop": min(loop.wall[1:])}
    if reason is not None:
        return start | {"reason": reason}
    wall, cpu = process.wall[1:], process.cpu[1:]
    return start | {
        "seconds": min(wall),
        "cpu": min(cpu),
        "memory": process.memory,
        "ratio": min(wall) / min(loop.wall[1:]),
        "ratio of medians": statistics.median(wall) / statistics.median(loop.wall[1:]),
        "ratio of CPU time": min(cpu) / min(loop.cpu[1:]),
        "rounds": len(wall),
        "load": os.getloadavg()[0],
        "target": TARGETS.get((threads, work.name, system)),
    }


def scale(folder: Path, threads: int, rounds: int, max_clients: int) -> Iterator[Row]:
    """Rounds of W3 with an increasing number of clients and a constant total number of steps."""
    counts = [10]
    while counts[-1] * 10 <= max_clients:
        counts.append(counts[-1] * 10)
    stacked = System("grid:stacked", "benchmarks.grid", ("stacked",))
    for clients in counts:
        # A client takes at least one step, so the largest number of clients determines the total work.
        work = replace(WORKLOADS[2], clients=clients, steps=counts[-1] // clients)
        size = clients * (work.steps * work.batch + work.tests) * math.prod(work.shape) * 4
        for found in compare(work, [stacked], folder, threads, rounds, 0):
            yield found | {"data": size}


def evaluations(folder: Path, workloads: Sequence[Workload], tests: int = 64) -> dict[str, float]:
    """Time of a stacked evaluation of each workload's users, as a ratio to one user after the other.

    Both on one thread, medians of interleaved repeats.
    """
    out = {}
    for work in workloads:
        ctx = build_context(replace(work, tests=tests).run(folder, 2))
        columns = {user: global_columns(ctx, user) for user in served_users(ctx)}
        state = ctx.initial_server_state()
        jobs = [Evaluate(ctx, user, state, None, COLUMNS, cells) for user, cells in columns.items()]
        calls = {name: partial(ClientExecutor(name, 1).run, jobs) for name in ("one", "stacked")}
        with torch_threads(1):
            seconds = interleaved(calls, 4)
        out[work.name] = statistics.median(seconds["stacked"][1:]) / statistics.median(seconds["one"][1:])
    return out


def bank(users: int = 10_000, rows: int = 256, repeats: int = 30) -> dict[str, float]:
    """Cost of the online bank with the sensor network on one thread, for batches of rows from different users.

    Returns:
        Ratios to a plain evaluation pass of the same rows (medians of interleaved repeats), and bytes per user.
    """
    model = build("har-cnn", (6, 128), 6, seed=0).eval()
    x = torch.randn(rows, 6, 128, generator=torch.Generator().manual_seed(0))
    net = personalize(model, rule("pseudo:n0=64"), capacity=users)
    user_ids = torch.arange(users)
    with torch_threads(1), torch.no_grad():
        for part in user_ids.split(rows):
            net(x[: len(part)], user=part)
        ids = user_ids[:rows]

        def predict_only() -> None:
            with net.frozen():
                net.predict(x, user=ids)

        variants = {"stock": lambda: model(x), "predict": predict_only, "predict and commit": lambda: net(x, user=ids)}
        times = interleaved(variants, repeats)
    stock = statistics.median(times.pop("stock"))
    costs = {f"{name}, ratio to stock": statistics.median(seconds) / stock for name, seconds in times.items()}
    return costs | {"state, bytes per user": float(len(net.state(0).to_bytes()))}


def starts() -> dict[str, float]:
    """Startup time of the library and of the command line, each in new processes."""

    def start(code: str) -> object:
        return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)

    return {name: min(seconds_of(partial(start, code)) for _ in range(3)) for name, code in COMMANDS.items()}


def measure(
    systems: Sequence[System],
    threads: Sequence[int],
    rounds: int,
    max_clients: int,
    log: Callable[[str], None] = print,
) -> dict[str, object]:
    """Run all benchmarks and return the results as plain values.

    Args:
        systems: other simulators to measure beside `OURS`.
        threads: numbers of threads; other simulators have the last.
        rounds: smallest number of measured rounds.
        max_clients: largest number of clients of the scaling curve.
        log: called with each row as soon as it is measured.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows: list[Row] = []
        for count in threads:
            compared = [*OURS, *systems] if count == threads[-1] else OURS
            for work in WORKLOADS:
                rows += logged(compare(work, compared, folder, count, rounds, 10), log)
        return {
            "torch": torch.__version__,
            "ratios": rows,
            **measure_quick(log),
            "scale": [row for n in threads for row in logged(scale(folder, n, rounds, max_clients), log)],
            "evaluation": evaluations(folder, WORKLOADS),
            "bank": bank(),
            "starts": starts(),
        }


def measure_quick(log: Callable[[str], None] = print) -> dict[str, list[Row]]:
    """Two small workloads on one thread, to warn about regressions in half a minute."""
    with tempfile.TemporaryDirectory() as name:
        return {"quick": [row for work in QUICK for row in logged(compare(work, OURS[:1], Path(name), 1, 3, 2), log)]}


def logged(rows: Iterable[Row], log: Callable[[str], None]) -> list[Row]:
    """All rows; each is logged as soon as it is measured."""
    out = []
    for found in rows:
        log(", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in found.items()))
        out.append(found)
    return out

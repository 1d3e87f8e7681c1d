"""Time rounds of a workload in the engines, beside the bare loop."""

from __future__ import annotations

import multiprocessing
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from benchmarks.loop import Loop
from benchmarks.workloads import WORKLOADS, Workload
from clients.app import app as client_app
from clients.jobs import Evaluate
from fedbn.federation.metrics import COLUMNS
from fedbn.federation.run import Run
from fedbn.federation.server import Outcome, global_columns, served_users
from fedbn.federation.setup import build_context
from fedbn.models import build
from fedbn.online import personalize, rule
from fedbn.stacked.executors import ClientExecutor, Executor
from fedbn.stacked.memory import collect_garbage_rarely, keep_freed_memory
from simulations.engines.grid import InProcessGrid
from simulations.flower.compat import task_identity
from simulations.server.rounds import Listener, run_rounds

SPEEDS = {"W1": 0.60, "W2": 0.40, "W3": 0.05}
"""The shares of the bare loop's time that a round is to take."""

COMMANDS = {
    "import fedbn": "import fedbn",
    "import fedbn.federation.loop": "import fedbn.federation.loop",
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


@dataclass(frozen=True)
class Timing:
    """Seconds of the rounds of an engine."""

    wall: list[float]
    cpu: list[float]


def grid_rounds(run: Run, executor: Executor, between: Callable[[], None] = lambda: None) -> Timing:
    """Time rounds over the grid - messages, state, aggregation and metrics.

    The first is left out, since it chooses and warms up, and so is the last, which evaluates: the bare loop does not.

    Args:
        run: what to do.
        executor: how.
        between: called after each round; takes no part in its time.
    """
    grid = InProcessGrid(
        client_app, len(build_context(run).population.users), {"run": run.to_json()}, executor=executor
    )
    timing = Timing([], [])
    began = [time.perf_counter(), time.process_time()]

    def note(number: int, outcome: Outcome) -> None:
        timing.wall.append(time.perf_counter() - began[0])
        timing.cpu.append(time.process_time() - began[1])
        between()
        began[:] = time.perf_counter(), time.process_time()

    with torch_threads(1), task_identity(grid.run.run_id):
        run_rounds(grid, run, Listener(on_round=note))
    return Timing(timing.wall[1:-1], timing.cpu[1:-1])


def row(work: Workload, engine: str, loop: Loop, timing: Timing) -> dict[str, object]:
    """One line of the table. Its ratio is that of the fastest rounds: what else ran on the machine only slows down."""
    return {
        "workload": work.name,
        "engine": engine,
        "loop": min(loop.wall),
        "seconds": min(timing.wall),
        "ratio": min(timing.wall) / min(loop.wall),
        "ratio of medians": statistics.median(timing.wall) / statistics.median(loop.wall),
        "ratio of CPU time": min(timing.cpu) / min(loop.cpu) if timing.cpu else None,
        "load": os.getloadavg()[0],
        "target": SPEEDS[work.name] if engine.startswith("grid:") else None,
    }


def ratios(
    folder: Path, executors: Sequence[Executor], rounds: int, works: Sequence[Workload]
) -> Iterator[dict[str, object]]:
    """One row a workload and tier; a round of the bare loop follows every round of the engine."""
    for work in works:
        run = work.run(folder, rounds)
        for executor in executors:
            with Loop(run) as loop:
                timing = grid_rounds(run, executor, loop.round)
                yield row(work, f"grid:{executor}", loop, timing)


def ray_rows(folder: Path, rounds: int, works: Sequence[Workload]) -> Iterator[dict[str, object]]:
    """The same over Flower's own simulation: seconds a round of a run, starting Ray left out by a run of one round."""
    from simulations.engines.execute import execute

    for work in works:
        spent = {}
        for number in (1, rounds):
            began = time.perf_counter()
            execute(work.run(folder, number), "ray")
            spent[number] = time.perf_counter() - began
        with Loop(work.run(folder, rounds)) as loop:
            for _ in range(rounds):
                loop.round()
            yield row(work, "ray", loop, Timing([(spent[rounds] - spent[1]) / (rounds - 1)], []))


def peer_rows(folder: Path, python: str, rounds: int, works: Sequence[Workload]) -> Iterator[dict[str, object]]:
    """pfl-research on the same workloads, taking turns with the loop; ``python`` is an interpreter that has it."""
    for work in works:
        run = work.run(folder, rounds)
        with Loop(run) as loop, Loop(run, python=python, module="benchmarks.peers") as peer:
            for _ in range(rounds):
                peer.round()
                loop.round()
            yield row(work, "pfl", loop, Timing(peer.wall, peer.cpu))


def scale(folder: Path, executor: Executor, rounds: int, most: int) -> Iterator[dict[str, object]]:
    """Rounds of W3 with more and more clients that together take ever the same number of steps, beside the bare loop.

    Each number of clients has a process of its own, whose memory is then its own too.
    """
    counts = [10]
    while counts[-1] * 10 <= most:
        counts.append(counts[-1] * 10)
    fresh = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, fresh, max_tasks_per_child=1) as pool:
        yield from pool.map(partial(_scaled, folder, executor, rounds, counts[-1]), counts)


def _scaled(folder: Path, executor: Executor, rounds: int, steps: int, clients: int) -> dict[str, object]:
    small = WORKLOADS[2]
    # Most clients cannot take fewer than a step each: the work is what the largest round needs.
    work = Workload("W3", small.shape, small.classes, small.model, clients, steps // clients, small.batch)
    keep_freed_memory()
    collect_garbage_rarely()
    run = work.run(folder, rounds)
    data = sum(u.train.x.nbytes + u.test.x.nbytes for u in build_context(run).population.users)
    before = _peak()
    with Loop(run) as loop:
        seconds = min(grid_rounds(run, executor, loop.round).wall)
    grown = _peak() - before
    return {
        "clients": clients,
        "steps": work.steps,
        "seconds": seconds,
        "loop": min(loop.wall),
        "data": data,
        "memory": grown,
    }


def _peak() -> int:
    """Most memory that this process has had, in bytes.

    Linux counts what the process that started this one had towards ``ru_maxrss``, but not towards ``VmHWM``.
    """
    status = Path("/proc/self/status")
    if status.exists():
        return 1024 * int(status.read_text(encoding="utf-8").split("VmHWM:")[1].split()[0])
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def evaluations(folder: Path, works: Sequence[Workload], tests: int = 64) -> dict[str, float]:
    """Seconds that the whole matrix of each workload's users takes in stacks, as a share of one user after the other.

    Both on one thread; medians of interleaved repeats.
    """
    out = {}
    for work in works:
        ctx = build_context(replace(work, tests=tests).run(folder, 2))
        columns = {user: global_columns(ctx, user) for user in served_users(ctx)}
        jobs = [Evaluate(ctx, user, ctx.start(), None, COLUMNS, asked) for user, asked in columns.items()]
        executors = {name: ClientExecutor(name, 1) for name in ("one", "stacked")}
        spent: dict[str, list[float]] = {name: [] for name in executors}
        with torch_threads(1):
            for _ in range(4):
                for name, way in executors.items():
                    began = time.perf_counter()
                    way.run(jobs)
                    spent[name].append(time.perf_counter() - began)
        out[work.name] = statistics.median(spent["stacked"][1:]) / statistics.median(spent["one"][1:])
    return out


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


def measure(
    executors: Sequence[Executor],
    rounds: int,
    most: int,
    ray: bool,
    peers: str | None = None,
    say: Callable[[str], None] = print,
) -> dict[str, object]:
    """Everything, as plain values.

    Args:
        executors: of the grid.
        rounds: of each engine.
        most: clients of the scale curve.
        ray: measure Flower's own simulation too.
        peers: an interpreter that has pfl, which is then measured too.
        say: told each value as soon as it is known.
    """

    def told(parts: Iterable[dict[str, object]]) -> list[dict[str, object]]:
        known = []
        for part in parts:
            say(", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in part.items()))
            known.append(part)
        return known

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        return {
            "rounds": rounds,
            "torch": torch.__version__,
            "ratios": told(ratios(folder, executors, rounds, WORKLOADS))
            + told(ray_rows(folder, rounds, WORKLOADS) if ray else ())
            + told(peer_rows(folder, peers, rounds, WORKLOADS) if peers else ()),
            "scale": told(scale(folder, "stacked", rounds, most)),
            "evaluation": evaluations(folder, WORKLOADS),
            "bank": bank(),
            "starts": starts(),
        }

"""Measure rounds of the engines, and compare them with the plain PyTorch loop."""

from __future__ import annotations

import multiprocessing
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from benchmarks.loop import Loop
from benchmarks.workloads import WORKLOADS, Workload
from fedbn.federation.metrics import COLUMNS
from fedbn.federation.run import Run
from fedbn.federation.server import Outcome, global_columns, served_users
from fedbn.federation.setup import build_context
from fedbn.models import build
from fedbn.nn.threads import torch_threads
from fedbn.online import personalize
from fedbn.online.rules.base import rule
from fedbn.stacked.executors import ClientExecutor, Executor
from fedbn.stacked.memory import collect_garbage_rarely, keep_freed_memory
from fedbn_clients.app import app as client_app
from fedbn_clients.jobs import Evaluate
from fedbn_simulations.engines.grid import InProcessGrid
from fedbn_simulations.flower.compat import task_identity
from fedbn_simulations.server.rounds import Listener, run_rounds

TARGETS = {"W1": 0.60, "W2": 0.40, "W3": 0.05}
"""Target ratio of a round's time to the plain loop's, by workload."""

COMMANDS = {
    "import fedbn": "import fedbn",
    "import fedbn.federation.loop": "import fedbn.federation.loop",
    "fedbn --help": "import sys; sys.argv = ['fedbn', '--help']; from fedbn_simulations.cli import main; main()",
}


@dataclass(frozen=True)
class Timing:
    """Wall-clock and CPU seconds of each round of an engine."""

    wall: list[float]
    cpu: list[float]


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


def grid_rounds(run: Run, executor: Executor, between: Callable[[], None] = lambda: None) -> Timing:
    """Time rounds on the grid, with messages, states, aggregation and metrics.

    The first round (warm-up, choice of executor) and the last (evaluation) are left out.

    Args:
        run: the run to execute.
        executor: how the clients' jobs are executed.
        between: called after each round, outside the measured time.
    """
    users = len(build_context(run).population.users)
    grid = InProcessGrid(client_app, users, {"run": run.to_json()}, executor=executor)
    timing = Timing([], [])
    start = [time.perf_counter(), time.process_time()]

    def on_round(number: int, outcome: Outcome) -> None:
        timing.wall.append(time.perf_counter() - start[0])
        timing.cpu.append(time.process_time() - start[1])
        between()
        start[:] = time.perf_counter(), time.process_time()

    with torch_threads(1), task_identity(grid.run.run_id):
        run_rounds(grid, run, Listener(on_round=on_round))
    return Timing(timing.wall[1:-1], timing.cpu[1:-1])


def row(work: Workload, engine: str, loop: Loop, timing: Timing) -> dict[str, object]:
    """One row of the table. The ratio uses the fastest rounds, since other load on the machine only adds time."""
    return {
        "workload": work.name,
        "engine": engine,
        "loop": min(loop.wall),
        "seconds": min(timing.wall),
        "ratio": min(timing.wall) / min(loop.wall),
        "ratio of medians": statistics.median(timing.wall) / statistics.median(loop.wall),
        "ratio of CPU time": min(timing.cpu) / min(loop.cpu) if timing.cpu else None,
        "load": os.getloadavg()[0],
        "target": TARGETS[work.name] if engine.startswith("grid:") else None,
    }


def ratios(
    folder: Path, executors: Sequence[Executor], rounds: int, workloads: Sequence[Workload]
) -> Iterator[dict[str, object]]:
    """One row per workload and executor. A round of the plain loop follows each round of the engine."""
    for work in workloads:
        run = work.run(folder, rounds)
        for executor in executors:
            with Loop(run) as loop:
                timing = grid_rounds(run, executor, loop.round)
                yield row(work, f"grid:{executor}", loop, timing)


def ray_rows(folder: Path, rounds: int, workloads: Sequence[Workload]) -> Iterator[dict[str, object]]:
    """The same for Flower's Ray simulation. A run of one round is subtracted to exclude the start of Ray."""
    from fedbn_simulations.engines.execute import execute

    for work in workloads:
        seconds = {n: seconds_of(partial(execute, work.run(folder, n), "ray")) for n in (1, rounds)}
        with Loop(work.run(folder, rounds)) as loop:
            for _ in range(rounds):
                loop.round()
            yield row(work, "ray", loop, Timing([(seconds[rounds] - seconds[1]) / (rounds - 1)], []))


def peer_rows(folder: Path, python: str, rounds: int, workloads: Sequence[Workload]) -> Iterator[dict[str, object]]:
    """The same for pfl-research, alternating with the loop. ``python`` is an interpreter with pfl installed."""
    for work in workloads:
        run = work.run(folder, rounds)
        with Loop(run) as loop, Loop(run, python=python, module="benchmarks.peers") as peer:
            for _ in range(rounds):
                peer.round()
                loop.round()
            yield row(work, "pfl", loop, Timing(peer.wall, peer.cpu))


def scale(folder: Path, executor: Executor, rounds: int, max_clients: int) -> Iterator[dict[str, object]]:
    """Rounds of W3 with an increasing number of clients and a constant total number of steps.

    Each number of clients is measured in a separate process, because peak memory is per process.
    """
    counts = [10]
    while counts[-1] * 10 <= max_clients:
        counts.append(counts[-1] * 10)
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, spawn, max_tasks_per_child=1) as pool:
        yield from pool.map(partial(_scale_row, folder, executor, rounds, counts[-1]), counts)


def _scale_row(folder: Path, executor: Executor, rounds: int, steps: int, clients: int) -> dict[str, object]:
    small = WORKLOADS[2]
    # A client takes at least one step, so the largest number of clients determines the total work.
    work = Workload("W3", small.shape, small.classes, small.model, clients, steps // clients, small.batch)
    keep_freed_memory()
    collect_garbage_rarely()
    run = work.run(folder, rounds)
    data = sum(u.train.x.nbytes + u.test.x.nbytes for u in build_context(run).population.users)
    before = _peak_memory()
    with Loop(run) as loop:
        seconds = min(grid_rounds(run, executor, loop.round).wall)
    row = {"clients": clients, "steps": work.steps, "seconds": seconds, "loop": min(loop.wall)}
    return row | {"data": data, "memory": _peak_memory() - before}


def _peak_memory() -> int:
    """Peak memory of this process in bytes.

    On Linux, ``ru_maxrss`` includes the memory of the parent process; ``VmHWM`` does not.
    """
    status = Path("/proc/self/status")
    if status.exists():
        return 1024 * int(status.read_text(encoding="utf-8").split("VmHWM:")[1].split()[0])
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


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
    executors: Sequence[Executor],
    rounds: int,
    max_clients: int,
    ray: bool,
    peers: str | None = None,
    log: Callable[[str], None] = print,
) -> dict[str, object]:
    """Run all benchmarks and return the results as plain values.

    Args:
        executors: executors of the grid.
        rounds: number of rounds of each engine.
        max_clients: largest number of clients of the scaling curve.
        ray: also measure Flower's Ray simulation.
        peers: interpreter with pfl installed; measures pfl-research too.
        log: called with each row as soon as it is measured.
    """

    def logged(rows: Iterable[dict[str, object]]) -> list[dict[str, object]]:
        out = []
        for row in rows:
            log(", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()))
            out.append(row)
        return out

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        return {
            "rounds": rounds,
            "torch": torch.__version__,
            "ratios": logged(ratios(folder, executors, rounds, WORKLOADS))
            + logged(ray_rows(folder, rounds, WORKLOADS) if ray else ())
            + logged(peer_rows(folder, peers, rounds, WORKLOADS) if peers else ()),
            "scale": logged(scale(folder, "stacked", rounds, max_clients)),
            "evaluation": evaluations(folder, WORKLOADS),
            "bank": bank(),
            "starts": starts(),
        }

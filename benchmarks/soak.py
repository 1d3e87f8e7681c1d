"""``python -m benchmarks.soak``: memory over many rounds with many clients and states on disk.

A small network is trained with FedBN, so every client has a state. A fraction of the clients trains in each round;
client states are stored on disk between rounds. Memory is read after every round. Its growth is the slope of a line
through the second half of the readings, when caches are full. Each reading is appended to a file of JSON lines, so
an early stop loses nothing. The last line is a summary, after all clients have been evaluated once.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Context, Message
from safetensors.torch import load_file, save_file

from fedbn.config import Plan
from fedbn.federation.run import Run
from fedbn.federation.server import Outcome
from fedbn.nn.roles import State
from fedbn.stacked.memory import keep_freed_memory
from fedbn_clients.app import app as client_app
from fedbn_clients.records import arrays, set_threads, tensors
from fedbn_simulations.engines.grid import MAX_OPEN_CALLS, InProcessGrid
from fedbn_simulations.flower.compat import task_identity
from fedbn_simulations.server.rounds import Listener, run_rounds

FEATURES, ROWS, CLASSES = 16, 12, 4

Reading = dict[str, float]


class DiskGrid(InProcessGrid):
    """A grid that stores client states on disk between messages."""

    def __init__(self, folder: Path, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.folder = folder

    def context(self, node: int) -> Context:
        """Context of a node. Its state is loaded from disk if it exists there."""
        in_memory = node in self.contexts
        context = super().context(node)
        path = self._path(node)
        if not in_memory and path.exists():
            records: dict[str, State] = {}
            for key, value in load_file(path).items():
                name, _, entry = key.partition("/")
                records.setdefault(name, {})[entry] = value
            for name, state in records.items():
                context.state[name] = arrays(state)
        return context

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Run the clients of these messages, then write their states to disk."""
        messages = list(messages)
        ids: list[str] = []
        for first in range(0, len(messages), MAX_OPEN_CALLS):
            crowd = messages[first : first + MAX_OPEN_CALLS]
            ids += super().push_messages(crowd)
            if crowd[0].metadata.message_type == "train":
                self._save_states()
            self.contexts.clear()
        return ids

    def _save_states(self) -> None:
        for node, context in self.contexts.items():
            state = {f"{n}/{k}": v for n, r in context.state.array_records.items() for k, v in tensors(r).items()}
            temporary = self.folder / f".{node}"
            save_file(state, temporary)
            temporary.replace(self._path(node))

    def _path(self, node: int) -> Path:
        return self.folder / f"{node}.safetensors"


def resident_memory(pid: int | str = "self") -> int:
    """Resident memory of a process in bytes."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def growth(memory: Sequence[float]) -> float | None:
    """Slope of a line through the second half of the readings. None with fewer than three readings in it.

    >>> round(growth([9.0, 5.0, 7.0, 1.0, 3.0, 5.0, 7.0, 9.0]), 6)
    2.0
    """
    tail = memory[len(memory) // 2 :]
    return float(np.polyfit(range(len(tail)), tail, 1)[0]) if len(tail) > 2 else None


def soak(
    clients: int, rounds: int, share: float, folder: Path, log: Callable[[Reading], None] = lambda reading: None
) -> dict[str, Any]:
    """Run the federation and measure memory after every round.

    Args:
        clients: number of clients.
        rounds: number of rounds.
        share: fraction of the clients that trains in each round.
        folder: directory for data and states.
        log: called with the reading of each round: its number, seconds since the start, bytes of memory.

    Returns:
        Seconds, memory growth per round in bytes, and number and bytes of the states on disk.
    """
    rng = np.random.default_rng(0)
    y = np.tile(np.arange(CLASSES), clients * ROWS // CLASSES)
    owners = np.repeat(np.arange(clients), ROWS)
    shift = rng.normal(size=(clients, FEATURES))[owners]
    x = (rng.normal(size=(len(y), FEATURES)) + np.eye(CLASSES, FEATURES)[y] * 3 + shift).astype(np.float32)
    data = folder / "soak.npz"
    np.savez(data, x=x, y=y, user=owners)
    clients_per_round = max(2, round(clients * share))
    plan = Plan(rounds=rounds, clients_per_round=clients_per_round, batch_size=4, eval_every=rounds, global_test=1)
    run = Run(f"files:path={data}:unseen=0", "fedbn", model="mlp", plan=plan).resolved()
    states = folder / "states"
    states.mkdir()
    readings: list[Reading] = []

    def on_round(number: int, outcome: Outcome) -> None:
        readings.append({"round": number, "seconds": time.perf_counter() - start, "memory": resident_memory()})
        log(readings[-1])

    grid = DiskGrid(states, client_app, clients, {"run": run.to_json()}, executor="stacked")
    start = time.perf_counter()
    with task_identity(grid.run.run_id):
        outcome = run_rounds(grid, run, Listener(on_round=on_round))
    trained, last = readings[:-1], readings[-1]  # the last round also evaluates all clients
    durations = np.diff([r["seconds"] for r in trained])
    files = list(states.iterdir())
    return {
        "clients": clients,
        "rounds": rounds,
        "clients per round": clients_per_round,
        "seconds": last["seconds"],
        "seconds per round": float(np.median(durations)) if len(durations) else None,
        "seconds of the last round, with evaluation": last["seconds"] - trained[-1]["seconds"],
        "memory after the first round": readings[0]["memory"],
        "memory before the last round": trained[-1]["memory"],
        "memory after evaluation": last["memory"],
        "growth per round": growth([r["memory"] for r in trained]),
        "states": len(files),
        "state bytes": sum(f.stat().st_size for f in files),
        "own accuracy": outcome.curve[-1].own,
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark, and print and write the results."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.soak", description=__doc__)
    parser.add_argument("--clients", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--share", type=float, default=0.01)
    parser.add_argument("--out", type=Path, default=Path("results/soak.jsonl"))
    args = parser.parse_args(argv)
    if args.rounds < 2:
        parser.error("--rounds must be at least 2: the last round also evaluates and is not measured")
    keep_freed_memory()
    set_threads()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with args.out.open("w", encoding="utf-8") as file, tempfile.TemporaryDirectory() as folder:

        def write(reading: dict[str, Any]) -> None:
            print(json.dumps(reading), file=file, flush=True)

        def log(reading: Reading) -> None:
            write(reading)
            if reading["round"] % 10 == 1 or reading["round"] >= args.rounds - 1:
                megabytes = reading["memory"] / 1e6
                print(f"round {reading['round']}: {reading['seconds']:.0f} s, {megabytes:.1f} MB", flush=True)

        result = soak(args.clients, args.rounds, args.share, Path(folder), log)
        write(result)
    for name, value in result.items():
        print(f"{name}: {value}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

"""``python -m benchmarks.soak``: many clients, many rounds, states on disk; does memory grow with the rounds?

A small network is trained as FedBN, so that every client owns a state, by a small share of the clients a round. What a
client keeps lies on disk between its rounds. Memory is read after every round; its growth is the slope of a line
through the second half of the readings, by when caches are full. Readings go to a file of JSON lines as they come, so
that one who stops it early has them; the last line sums up, after everybody was evaluated once.
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

from clients.app import app as client_app
from clients.records import arrays, set_threads, tensors
from fedbn.config import Plan
from fedbn.federation.run import Run
from fedbn.federation.server import Outcome
from fedbn.nn.roles import State
from fedbn.stacked.memory import keep_freed_memory
from simulations.engines.grid import CROWD, InProcessGrid
from simulations.flower.compat import task_identity
from simulations.server.rounds import Listener, run_rounds

FEATURES, ROWS, CLASSES = 16, 12, 4

Reading = dict[str, float]


class DiskGrid(InProcessGrid):
    """A grid whose clients' states lie on disk while no message is for them."""

    def __init__(self, folder: Path, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.folder = folder

    def context(self, node: int) -> Context:
        """A node's context, its state read from disk if it has one there."""
        known = node in self.contexts
        context = super().context(node)
        path = self._path(node)
        if not known and path.exists():
            records: dict[str, State] = {}
            for key, value in load_file(path).items():
                name, _, entry = key.partition("/")
                records.setdefault(name, {})[entry] = value
            for name, state in records.items():
                context.state[name] = arrays(state)
        return context

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Run the messages' clients, then put their states away."""
        messages = list(messages)
        ids: list[str] = []
        for first in range(0, len(messages), CROWD):
            crowd = messages[first : first + CROWD]
            ids += super().push_messages(crowd)
            if crowd[0].metadata.message_type == "train":
                self._put_away()
            self.contexts.clear()
        return ids

    def _put_away(self) -> None:
        for node, context in self.contexts.items():
            kept = {f"{n}/{k}": v for n, r in context.state.array_records.items() for k, v in tensors(r).items()}
            beside = self.folder / f".{node}"
            save_file(kept, beside)
            beside.replace(self._path(node))

    def _path(self, node: int) -> Path:
        return self.folder / f"{node}.safetensors"


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def growth(memory: Sequence[float]) -> float | None:
    """Slope of a line through the second half of readings; None if they are too few for one.

    >>> round(growth([9.0, 5.0, 7.0, 1.0, 3.0, 5.0, 7.0, 9.0]), 6)
    2.0
    """
    rest = memory[len(memory) // 2 :]
    return float(np.polyfit(range(len(rest)), rest, 1)[0]) if len(rest) > 2 else None


def soak(
    clients: int, rounds: int, share: float, folder: Path, say: Callable[[Reading], None] = lambda reading: None
) -> dict[str, Any]:
    """Run, and measure after every round.

    Args:
        clients: how many there are.
        rounds: how many rounds.
        share: of the clients, drawn a round.
        folder: for data and states.
        say: told the reading of each round: its number, seconds since the beginning, bytes in memory.

    Returns:
        Seconds, bytes of growth a round, clients with a state and its bytes on disk.
    """
    draw = np.random.default_rng(0)
    y = np.tile(np.arange(CLASSES), clients * ROWS // CLASSES)
    owners = np.repeat(np.arange(clients), ROWS)
    shift = draw.normal(size=(clients, FEATURES))[owners]
    x = (draw.normal(size=(len(y), FEATURES)) + np.eye(CLASSES, FEATURES)[y] * 3 + shift).astype(np.float32)
    data = folder / "soak.npz"
    np.savez(data, x=x, y=y, user=owners)
    drawn = max(2, round(clients * share))
    plan = Plan(rounds=rounds, clients_per_round=drawn, batch_size=4, eval_every=rounds, global_test=1)
    run = Run(f"files:path={data}:unseen=0", "fedbn", model="mlp", plan=plan).resolved()
    states = folder / "states"
    states.mkdir()
    readings: list[Reading] = []

    def on_round(number: int, outcome: Outcome) -> None:
        readings.append({"round": number, "seconds": time.perf_counter() - began, "memory": resident()})
        say(readings[-1])

    grid = DiskGrid(states, client_app, clients, {"run": run.to_json()}, executor="stacked")
    began = time.perf_counter()
    with task_identity(grid.run.run_id):
        outcome = run_rounds(grid, run, Listener(on_round=on_round))
    trained, last = readings[:-1], readings[-1]  # the last round also evaluates everybody
    spent = np.diff([r["seconds"] for r in trained])
    files = list(states.iterdir())
    return {
        "clients": clients,
        "rounds": rounds,
        "drawn a round": drawn,
        "seconds": last["seconds"],
        "seconds a round": float(np.median(spent)) if len(spent) else None,
        "seconds of the last round, with everybody's evaluation": last["seconds"] - trained[-1]["seconds"],
        "memory after the first round": readings[0]["memory"],
        "memory before the last round": trained[-1]["memory"],
        "memory in the end": last["memory"],
        "growth a round": growth([r["memory"] for r in trained]),
        "states": len(files),
        "state bytes": sum(f.stat().st_size for f in files),
        "own accuracy": outcome.curve[-1].own,
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.soak", description=__doc__)
    parser.add_argument("--clients", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--share", type=float, default=0.01)
    parser.add_argument("--out", type=Path, default=Path("results/soak.jsonl"))
    chosen = parser.parse_args(argv)
    if chosen.rounds < 2:
        parser.error("--rounds must be at least 2: the last round is the one that evaluates")
    keep_freed_memory()
    set_threads()
    chosen.out.parent.mkdir(parents=True, exist_ok=True)
    with chosen.out.open("w", encoding="utf-8") as file, tempfile.TemporaryDirectory() as folder:

        def write(reading: dict[str, Any]) -> None:
            print(json.dumps(reading), file=file, flush=True)

        def say(reading: Reading) -> None:
            write(reading)
            if reading["round"] % 10 == 1 or reading["round"] >= chosen.rounds - 1:
                print(
                    f"round {reading['round']}: {reading['seconds']:.0f} s, {reading['memory'] / 1e6:.1f} MB",
                    flush=True,
                )

        result = soak(chosen.clients, chosen.rounds, chosen.share, Path(folder), say)
        write(result)
    for name, value in result.items():
        print(f"{name}: {value}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

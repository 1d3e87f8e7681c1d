"""``python -m benchmarks.soak``: many clients, many rounds, states on disk; does memory grow with the rounds?

A small network is trained as FedBN, so that every client owns a state, by a small share of the clients a round. What a
client keeps lies on disk between its rounds. Memory is read after every round; its growth is the slope of a line
through the second half of the readings, by when caches are full.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Context, Message
from safetensors.torch import load_file, save_file

from clients.app import app as client_app
from clients.records import arrays, set_threads, tensors
from fedbn.federation import Outcome
from fedbn.roles import State
from fedbn.run import Plan, Run
from fedbn.stacked.memory import keep_freed_memory
from simulations.app import Listener, conduct
from simulations.flower_compat import task_identity
from simulations.grid import InProcessGrid

FEATURES, ROWS, CLASSES = 16, 12, 4


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
        ids = super().push_messages(messages)
        for node, context in self.contexts.items():
            kept = {f"{n}/{k}": v for n, r in context.state.array_records.items() for k, v in tensors(r).items()}
            if kept:
                beside = self.folder / f".{node}"
                save_file(kept, beside)
                beside.replace(self._path(node))
        self.contexts.clear()
        return ids

    def _path(self, node: int) -> Path:
        return self.folder / f"{node}.safetensors"


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def soak(clients: int, rounds: int, share: float, folder: Path) -> dict[str, Any]:
    """Run, and measure after every round.

    Args:
        clients: how many there are.
        rounds: how many rounds.
        share: of the clients, drawn a round.
        folder: for data and states.

    Returns:
        Seconds, bytes in memory after each round, their growth a round, clients with a state and its bytes on disk.
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
    memory: list[int] = []
    times: list[float] = []

    def on_round(number: int, outcome: Outcome) -> None:
        memory.append(resident())
        times.append(time.perf_counter())

    grid = DiskGrid(states, client_app, clients, {"run": run.to_json()}, tier="stacked")
    began = time.perf_counter()
    with task_identity(grid.run.run_id):
        outcome = conduct(grid, run, Listener(on_round=on_round))
    rest = memory[rounds // 2 : -1]  # the last round also evaluates everybody
    files = list(states.iterdir())
    return {
        "clients": clients,
        "rounds": rounds,
        "drawn a round": drawn,
        "seconds": time.perf_counter() - began,
        "seconds a round": float(np.median(np.diff(times))) if rounds > 2 else None,
        "memory": memory,
        "growth a round": float(np.polyfit(range(len(rest)), rest, 1)[0]) if len(rest) > 2 else None,
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
    parser.add_argument("--out", type=Path, default=Path("results/soak.json"))
    chosen = parser.parse_args(argv)
    keep_freed_memory()
    set_threads()
    with tempfile.TemporaryDirectory() as folder:
        result = soak(chosen.clients, chosen.rounds, chosen.share, Path(folder))
    chosen.out.parent.mkdir(parents=True, exist_ok=True)
    chosen.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    memory = [m / 1e6 for m in result["memory"]]
    print(f"{result['clients']} clients, {result['rounds']} rounds of {result['drawn a round']}")
    print(f"{result['seconds']:.0f} s in all, {result['seconds a round'] or 0:.2f} s a round")
    points = f"{memory[0]:.1f}, {memory[len(memory) // 2]:.1f}, {memory[-2]:.1f}"
    print(f"memory MB after round 1, at half, before the last: {points}")
    print(f"growth in the second half: {(result['growth a round'] or 0) / 1e3:.2f} kB a round")
    size, own = result["state bytes"] / 1e6, result["own accuracy"]
    print(f"{result['states']} states on disk, {size:.1f} MB; own accuracy {own:.3f}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

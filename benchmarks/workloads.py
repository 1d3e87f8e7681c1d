"""Three workloads, small to large, and the bare loop that they are measured against.

======== ======================= ======= ===== ===== ==========
workload model                   clients steps batch parameters
======== ======================= ======= ===== ===== ==========
W1       FedBN's digit CNN       5       10    32    14,219,210
W2       1-D CNN 6-32-64-64      100     5     32    32,550
W3       MLP 64-32-10 with BN    100     5     16    2,474
======== ======================= ======= ===== ===== ==========

All train as FedBN with plain SGD. W2's model is written with ``Conv1d``, as users write it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from fedbn.config import Plan
from fedbn.data.batching import batches
from fedbn.federation.context import RunContext
from fedbn.federation.run import Run
from fedbn.nn.roles import State, clone


@dataclass(frozen=True)
class Workload:
    """What every client does in a round.

    Attributes:
        name: W1, W2 or W3.
        shape: of an example.
        classes: how many.
        model: text of the model.
        clients, steps, batch: how many, of how many rows.
        tests: rows of each client that are not trained on.
    """

    name: str
    shape: tuple[int, ...]
    classes: int
    model: str
    clients: int
    steps: int
    batch: int
    tests: int = 4

    def run(self, folder: Path, rounds: int) -> Run:
        """The workload as a run; its random data are written to ``folder``."""
        path = folder / f"{self.name}-{self.clients}-{self.steps}-{self.tests}.npz"
        if not path.exists():
            _write(self, path)
        plan = Plan(rounds=rounds, batch_size=self.batch, lr=0.01, momentum=0.0, eval_every=rounds, global_test=1)
        return Run(f"files:path={path}:unseen=0", "fedbn", model=self.model, plan=plan).resolved()

    def clients_at_constant_work(self, clients: int) -> Workload:
        """As many steps in all, by another number of clients."""
        return replace(self, clients=clients, steps=max(1, self.clients * self.steps // clients))


WORKLOADS = (
    Workload("W1", (3, 28, 28), 10, "digit-cnn", 5, 10, 32),
    Workload("W2", (6, 128), 6, "benchmarks.workloads:signals", 100, 5, 32),
    Workload("W3", (64,), 10, "mlp", 100, 5, 16),
)


def signals() -> nn.Module:
    """W2's model: three blocks of ``Conv1d``, BN, ReLU and pooling.

    >>> signals()(torch.zeros(2, 6, 128)).shape
    torch.Size([2, 6])
    """
    layers: list[nn.Module] = []
    before = 6
    for width in (32, 64, 64):
        layers += [nn.Conv1d(before, width, 5, padding=2), nn.BatchNorm1d(width), nn.ReLU(), nn.MaxPool1d(2)]
        before = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(before, 6))


def _write(work: Workload, path: Path) -> None:
    rng = np.random.default_rng(0)
    train = work.steps * work.batch
    rows = work.clients * (train + work.tests)
    recording = np.tile(np.repeat([0, 1], [train, work.tests]), work.clients)
    np.savez(
        path,
        x=rng.standard_normal((rows, *work.shape), dtype=np.float32),
        y=np.arange(rows) % work.classes,
        user=np.repeat(np.arange(work.clients), train + work.tests),
        recording=recording,
    )


def bare_loop(ctx: RunContext) -> Iterator[float]:
    """Seconds of each round of FedBN in plain PyTorch: one model, one optimizer a client, batches cut beforehand.

    Uses as many threads as torch is set to.
    """
    plan, model, keys = ctx.run.plan, ctx.scratch, ctx.ownership
    cut = {
        u: [ctx.training_data(u).take(i) for i in batches(len(ctx.training_data(u)), plan.batch_size, _draw())]
        for u in ctx.trainers
    }
    shared: State = ctx.start()
    kept = {u: {k: ctx.initial[k] for k in keys.retained} for u in ctx.trainers}
    model.train()
    while True:
        began = time.perf_counter()
        total = {k: torch.zeros_like(v) for k, v in shared.items()}
        for user, parts in cut.items():
            model.load_state_dict(shared | kept[user])
            optimizer = torch.optim.SGD(model.parameters(), lr=plan.lr)
            for part in parts:
                optimizer.zero_grad()
                F.cross_entropy(model(part.x), part.y).backward()  # type: ignore[no-untyped-call]
                optimizer.step()
            state = model.state_dict()
            kept[user] = clone({k: state[k] for k in keys.retained})
            for name, sum_ in total.items():
                sum_ += state[name]
        shared = {k: v / len(cut) for k, v in total.items()}
        yield time.perf_counter() - began


def _draw() -> torch.Generator:
    return torch.Generator().manual_seed(0)

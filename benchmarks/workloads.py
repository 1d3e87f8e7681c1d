"""Four workloads of different size, and the plain PyTorch loop as a baseline.

======== ======================= ======= ===== ===== ==========
workload model                   clients steps batch parameters
======== ======================= ======= ===== ===== ==========
W1       FedBN's digit CNN       5       10    32    14,219,210
W2       1-D CNN 6-32-64-64      100     5     32    32,550
W3       MLP 64-32-10 with BN    100     5     16    2,474
W4       PFLlib's CNN with BN    20      10    32    582,218
======== ======================= ======= ===== ===== ==========

All use FedBN with plain SGD, on random data: times do not depend on the values. W1 has the shape of FedBN's digits, W2
of windows of six sensors, W4 of Fashion-MNIST. The models of W2 and W4 are written as user code is.
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

from fedbn.config import Plan, Precision
from fedbn.data.batching import batches
from fedbn.federation.context import RunContext
from fedbn.federation.run import Run
from fedbn.nn.roles import State, clone

ENDLESS = 10**6
"""Number of rounds of a run that is stopped from outside."""


@dataclass(frozen=True)
class Workload:
    """The work of each client in a round.

    Attributes:
        name: W1 to W4, or ``W2 small``.
        shape: shape of an example.
        classes: number of classes.
        model: name or factory of the model.
        clients: number of clients.
        steps: training steps per client and round.
        batch: batch size.
        tests: number of test examples per client.
    """

    name: str
    shape: tuple[int, ...]
    classes: int
    model: str
    clients: int
    steps: int
    batch: int
    tests: int = 4

    def run(self, folder: Path, rounds: int = ENDLESS, precision: Precision = "float32") -> Run:
        """The workload as a run that is evaluated at its end. Its random data are written to ``folder``."""
        path = folder / f"{self.clients}-{self.steps}-{self.batch}-{self.tests}-{'x'.join(map(str, self.shape))}.npz"
        if not path.exists():
            _write(self, path)
        plan = Plan(
            rounds=rounds,
            batch_size=self.batch,
            lr=0.01,
            momentum=0.0,
            eval_every=rounds,
            global_test=1,
            precision=precision,
        )
        return Run(f"files:path={path}:unseen=0", "fedbn", model=self.model, plan=plan).resolved()


WORKLOADS = (
    Workload("W1", (3, 28, 28), 10, "digit-cnn", 5, 10, 32),
    Workload("W2", (6, 128), 6, "benchmarks.workloads:signals", 100, 5, 32),
    Workload("W3", (64,), 10, "mlp", 100, 5, 16),
    Workload("W4", (1, 28, 28), 10, "benchmarks.workloads:images", 20, 10, 32),
)

QUICK = (replace(WORKLOADS[1], name="W2 small", clients=10), WORKLOADS[2])
"""Workloads of the check for regressions."""


def signals() -> nn.Module:
    """W2's model: three blocks of ``Conv1d``, BN, ReLU and pooling.

    >>> signals()(torch.zeros(2, 6, 128)).shape
    torch.Size([2, 6])
    """
    layers: list[nn.Module] = []
    channels = 6
    for width in (32, 64, 64):
        layers += [nn.Conv1d(channels, width, 5, padding=2), nn.BatchNorm1d(width), nn.ReLU(), nn.MaxPool1d(2)]
        channels = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(channels, 6))


def images() -> nn.Module:
    """W4's model: PFLlib's network for Fashion-MNIST, with BN after its convolutions.

    >>> images()(torch.zeros(2, 1, 28, 28)).shape
    torch.Size([2, 10])
    """
    layers: list[nn.Module] = []
    channels = 1
    for width in (32, 64):
        layers += [nn.Conv2d(channels, width, 5), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(2)]
        channels = width
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(1024, 512), nn.ReLU(), nn.Linear(512, 10))


def _write(work: Workload, path: Path) -> None:
    rng = np.random.default_rng(0)
    train = work.steps * work.batch
    rows = work.clients * (train + work.tests)
    np.savez(
        path,
        x=rng.standard_normal((rows, *work.shape), dtype=np.float32),
        y=np.arange(rows) % work.classes,
        user=np.repeat(np.arange(work.clients), train + work.tests),
        recording=np.tile(np.repeat([0, 1], [train, work.tests]), work.clients),
    )


def plain_loop(ctx: RunContext) -> Iterator[float]:
    """Seconds of each round of FedBN in plain PyTorch: one model, one optimizer per client, precomputed batches.

    Uses the current number of torch threads.
    """
    plan, model, keys = ctx.run.plan, ctx.scratch, ctx.ownership
    client_batches = {
        u: [ctx.training_data(u).take(i) for i in batches(len(ctx.training_data(u)), plan.batch_size, _generator())]
        for u in ctx.trainers
    }
    shared: State = ctx.initial_server_state()
    local = {u: {k: ctx.initial[k] for k in keys.retained} for u in ctx.trainers}
    model.train()
    while True:
        start = time.perf_counter()
        total = {k: torch.zeros_like(v) for k, v in shared.items()}
        for user, user_batches in client_batches.items():
            model.load_state_dict(shared | local[user])
            optimizer = torch.optim.SGD(model.parameters(), lr=plan.lr)
            for batch in user_batches:
                optimizer.zero_grad()
                F.cross_entropy(model(batch.x), batch.y).backward()  # type: ignore[no-untyped-call]
                optimizer.step()
            state = model.state_dict()
            local[user] = clone({k: state[k] for k in keys.retained})
            for name, sum_ in total.items():
                sum_ += state[name]
        shared = {k: v / len(client_batches) for k, v in total.items()}
        yield time.perf_counter() - start


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)

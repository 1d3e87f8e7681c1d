"""Accuracy and time of other implementations on the same data, model and plan.

``python -m benchmarks.peer_accuracy pfllib CLONE --data DIR`` runs PFLlib's ``FedAvg`` and ``FedBN`` (clone of
TsingZ0/PFLlib, Zhang et al. 2023, https://arxiv.org/abs/2312.04992) on Fashion-MNIST files in DIR, and
``python -m benchmarks.peer_accuracy fedbn CLONE`` runs the ``fedavg`` and ``fedbn`` of FedBN's authors (clone of
med-air/FedBN, Li et al. 2021, https://arxiv.org/abs/2102.07623) on the six domains of digits. Both use their own
training loops, evaluation and aggregation. Nothing of them is part of this repository.

PFLlib's ``FedAvg`` exchanges ``parameters()``, so running statistics stay with the clients: this is SiloBN. Its
``FedBN`` finds BN by the letters ``bn`` in the name, so the model here is named like that. It drops incomplete batches,
so each client's training data are cut to whole batches for both sides.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import torch
from scipy import stats
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fedbn
from benchmarks.peers.pfllib import server, with_bn_names
from fedbn.config import Plan
from fedbn.data.examples import User
from fedbn.data.population import Population
from fedbn.errors import UserError
from fedbn.federation.run import Run
from fedbn.federation.setup import build_context
from fedbn.models.image_cnn import ImageCNN
from fedbn.scenarios.base import scenario

BATCH = 10
CLIENTS = 20

Curve = list[float]
"""Mean accuracy over clients before training and after each round, or after each round only."""


def fashion(directory: str, images: int) -> Population:
    """Fashion-MNIST of 20 clients, Dirichlet 0.1, with whole batches of training data."""
    path = f":path={directory}" if directory else ""
    run = Run(
        f"idx:data=fashion-mnist:split=pooled:users=1:unseen=0:images={images}{path}",
        "fedbn",
        model="image-cnn",
        partition=f"dirichlet:alpha=0.1:clients={CLIENTS}:least={4 * BATCH}",
    )
    population = build_context(run).population
    return replace(population, users=tuple(_whole_batches(user) for user in population.users), sources={})


def _whole_batches(user: User) -> User:
    rows = len(user.train) // BATCH * BATCH
    return replace(user, train=user.train.take(torch.arange(rows)))


def pfllib(
    clone: Path, population: Population, algorithm: str, rounds: int, lr: float, seed: int
) -> tuple[Curve, float]:
    """Curve and CPU seconds per round of training and aggregation of one of PFLlib's algorithms."""
    curve: Curve = []
    spent = 0.0

    def evaluate(peer: Any) -> None:
        nonlocal spent
        start = time.process_time()
        _, sizes, correct, _ = peer.test_metrics()
        curve.append(float(np.mean([c / n for c, n in zip(correct, sizes, strict=True)])))
        peer.rs_test_acc.append(sum(correct) / sum(sizes))
        spent += time.process_time() - start

    torch.manual_seed(seed)
    classes, plan = len(population.classes), Plan(rounds=rounds, batch_size=BATCH, lr=lr)
    model = with_bn_names(ImageCNN(population.shape, classes))
    with server(clone, algorithm, population.users, model, classes, plan, evaluate) as peer:
        torch.manual_seed(seed)
        start = time.process_time()
        peer.train()
        seconds = time.process_time() - start - spent
    return curve, seconds / (rounds + 1)


def authors(clone: Path, population: Population, mode: str, rounds: int, lr: float, seed: int) -> tuple[Curve, float]:
    """Curve and CPU seconds per round of training and aggregation of FedBN's digit experiment."""
    module = _authors_module(clone)
    torch.manual_seed(seed)
    shared, users = module.DigitModel(), population.users
    models = [copy.deepcopy(shared) for _ in users]
    loaders = [DataLoader(TensorDataset(u.train.x, u.train.y), 32, shuffle=True) for u in users]
    tests = [DataLoader(TensorDataset(u.test.x, u.test.y), 32) for u in users]
    module.client_num = len(users)  # a global variable that their functions read
    weights, loss, curve, seconds = [1 / len(users)] * len(users), nn.CrossEntropyLoss(), [], 0.0
    for _ in range(rounds):
        start = time.process_time()
        for i, (model, loader) in enumerate(zip(models, loaders, strict=True)):
            module.train(model, loader, torch.optim.SGD(model.parameters(), lr), loss, i, "cpu")
        shared, models = module.communication(SimpleNamespace(mode=mode), shared, models, weights)
        seconds += time.process_time() - start
        curve.append(float(np.mean([module.test(m, t, loss, "cpu")[1] for m, t in zip(models, tests, strict=True)])))
    return curve, seconds / rounds


def _authors_module(clone: Path) -> Any:
    """Their script as a module. It imports torchvision for the reading of files, which is not used here."""
    sys.path.insert(0, str(clone))
    try:
        import torchvision  # noqa: F401
    except ImportError:
        stub, transforms = ModuleType("torchvision"), ModuleType("torchvision.transforms")
        stub.transforms = transforms
        sys.modules.update({"torchvision": stub, "torchvision.transforms": transforms})
    from federated import fed_digits

    return fed_digits


def ours(data: Any, strategy: str, model: Any, plan: Plan, seed: int) -> tuple[Curve, float]:
    """The same from this package."""
    options = {k: getattr(plan, k) for k in ("rounds", "batch_size", "lr", "momentum", "weighting")}
    found = fedbn.federate(
        data, strategy, seed=seed, model=model, eval_every=1, global_test=20, engine="grid:stacked", **options
    )
    phases = found.outcome.phases
    seconds = (phases["training"] + phases["messages"]) / plan.rounds
    return [float(v) for v in found.curve()["own"]], seconds


def interval(a: Sequence[float], b: Sequence[float]) -> tuple[float, float]:
    """Welch's 95 % interval of the difference of two means.

    >>> [round(v, 2) for v in interval([1.0, 2.0, 3.0], [1.0, 2.0, 3.0])]
    [-2.27, 2.27]
    """
    found = stats.ttest_ind(a, b, equal_var=False).confidence_interval(0.95)
    return float(found.low), float(found.high)


def main(argv: Sequence[str] | None = None) -> int:
    """Run both sides and print a table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peer_accuracy", description=__doc__)
    parser.add_argument("peer", choices=("pfllib", "fedbn"))
    parser.add_argument("clone", type=Path, help="directory of the clone")
    parser.add_argument("--data", default="", help="pfllib: directory of the IDX files of Fashion-MNIST")
    parser.add_argument("--images", type=int, default=2500, help="pfllib: images of each published part")
    parser.add_argument("--train", type=int, default=128, help="fedbn: training images per domain")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--lr", type=float, help="learning rate; by default the peer's (0.005, 0.01)")
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args(argv)
    folder = "system" if args.peer == "pfllib" else "federated"
    if not (args.clone / folder).is_dir():
        raise UserError(f"{args.clone} has no directory {folder!r}: give the directory of a clone of the repository")
    run: Callable[..., tuple[Curve, float]]
    if args.peer == "pfllib":
        run, model, pairs = pfllib, "image-cnn", {"FedAvg": "silobn", "FedBN": "fedbn"}
        data = fashion(args.data, args.images)
        plan = Plan(rounds=args.rounds, batch_size=BATCH, lr=args.lr or 0.005, momentum=0.0)
    else:
        run, model, pairs = authors, "digit-cnn", {"fedavg": "global-naive", "fedbn": "fedbn"}
        data = scenario(f"digits:unseen=0:train={args.train}:test=100").load(0)
        plan = Plan(rounds=args.rounds, batch_size=32, lr=args.lr or 0.01, momentum=0.0, weighting="uniform")
    print("| peer | here | round | peer's accuracy | accuracy here | difference | s* peer | s* here |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for theirs, strategy in pairs.items():
        results: dict[str, list[tuple[Curve, float]]] = {"peer": [], "here": []}
        for seed in range(args.seeds):
            results["peer"].append(run(args.clone.resolve(), data, theirs, plan.rounds, plan.lr, seed))
            results["here"].append(ours(data, strategy, model, plan, seed))
            print(json.dumps({k: v[-1] for k, v in results.items()}), file=sys.stderr, flush=True)
        costs = [np.mean([seconds for _, seconds in results[side]]) for side in ("peer", "here")]
        for number in sorted({1, plan.rounds // 2, plan.rounds}):
            a, b = ([curve[number - 1 - plan.rounds] for curve, _ in results[side]] for side in ("peer", "here"))
            low, high = interval(b, a)
            print(
                f"| {theirs} | {strategy} | {number} | {np.mean(a):.3f} | {np.mean(b):.3f} | "
                f"{np.mean(b) - np.mean(a):+.3f} [{low:+.3f}, {high:+.3f}] | {costs[0]:.2f} | {costs[1]:.2f} |"
            )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

"""Subject-independent accuracy on HAPT: ``python -m benchmarks.hapt_baseline``.

Three folds over the 30 people; the first has the test people of UCI HAR. In each fold, a third of the training people
is left out, and each change of the scenario's settings is tried alone on these people (one seed). All changes that
gain `MARGIN` are chosen together. The chosen and the default settings are then tested once on the people of the fold,
who had no part in any choice. Windows of both recordings are used, as in UCI HAR. Finished runs are stored in
``results/hapt-baseline``.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

import fedbn
from fedbn.data.examples import Examples, User
from fedbn.data.population import Population
from fedbn.data.splits import carve_validation
from fedbn.errors import UserError
from fedbn.models.har_cnn import HarCNN
from fedbn.scenarios.base import scenario
from fedbn.scenarios.hapt import Hapt
from fedbn.seeds import numpy_generator

UCI_HAR_TEST = (2, 4, 9, 10, 12, 13, 18, 20, 24)
"""Numbers of the test people of UCI HAR, who took part in HAPT, too."""


class WideHarCNN(HarCNN):
    """`HarCNN` with twice as many channels."""

    name = "har-cnn-wide"
    about = "1-D CNN for sensor windows, 3 blocks with BN (64-128-128 channels)"
    widths = (64, 128, 128)


CHANGES: dict[str, dict[str, Any]] = {
    "longer": {"rounds": 32},
    "lower rate": {"lr": 0.02},
    "rotate": {"augment": "rotate:strength=0.2"},
    "jitter": {"augment": "jitter:scale=0.05"},
    "wide": {"model": "benchmarks.hapt_baseline:WideHarCNN"},
}
"""Changes of the scenario's settings, as options of `fedbn.compare`."""

MARGIN = 0.005
"""A change is chosen if it gains at least this much."""


def folds(people: int) -> list[tuple[int, ...]]:
    """Indices of the test people of each fold.

    >>> [len(fold) for fold in folds(30)], folds(30)[0][:3]
    ([9, 11, 10], (1, 3, 8))
    """
    first = tuple(number - 1 for number in UCI_HAR_TEST)
    rest = [i for i in range(people) if i not in first]
    order = numpy_generator(0, "folds").permutation(rest)
    return [first, *(tuple(sorted(part.tolist())) for part in np.array_split(order, 2))]


def left_out(users: Sequence[User], tested: Sequence[int]) -> Population:
    """The users, of whom those at ``tested`` are unseen and have the windows of both recordings as test data.

    Seen users train on both recordings except for the last tenth of each class, on which they are tested.
    """
    return Population(
        users=tuple(_tested(u) if i in tested else _trained(u) for i, u in enumerate(users)),
        unseen=tuple(tested),
        classes=Hapt.classes,
        skew="natural",
    )


def _tested(user: User) -> User:
    return User(user.name, user.domain, user.train, Examples.concat([user.train, user.test]))


def _trained(user: User) -> User:
    return carve_validation(replace(user, train=Examples.concat([user.train, user.test])), share=0.1)


def combine(scores: dict[str, float]) -> list[str]:
    """The changes that gain at least `MARGIN` over the default.

    >>> combine({"default": 0.90, "longer": 0.91, "wide": 0.902})
    ['longer']
    """
    return [name for name in CHANGES if scores.get(name, 0.0) - scores["default"] >= MARGIN]


def together(chosen: Sequence[str]) -> dict[str, Any]:
    """The options of several changes; augmentations are applied one after the other.

    >>> together(["rotate", "jitter"])
    {'augment': 'rotate:strength=0.2+jitter:scale=0.05'}
    """
    options: dict[str, Any] = {}
    for name in chosen:
        for key, value in CHANGES[name].items():
            options[key] = f"{options[key]}+{value}" if key in options else value
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Choose, test and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.hapt_baseline", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("results/hapt-baseline"), help="directory of results")
    parser.add_argument("--seeds", type=int, default=2, help="seeds of the final test")
    parser.add_argument("--folds", type=int, default=3, help="number of folds, in order")
    parser.add_argument("--changes", default=",".join(CHANGES), help="changes to try, comma-separated")
    args = parser.parse_args(argv)
    if unknown := set(args.changes.split(",")) - set(CHANGES):
        raise UserError(f"unknown changes {sorted(unknown)}: choose from {', '.join(CHANGES)}")
    changes = {name: CHANGES[name] for name in args.changes.split(",")}
    users = scenario("hapt").load(0).users
    rows = []

    def run(name: str, population: Population, settings: dict[str, Any], **options: Any) -> pd.DataFrame:
        plan = {
            "model": "har-cnn",
            "rounds": 16,
            "lr": 0.05,
            "schedule": "cosine",
            "batch_size": 32,
            "global_test": 100,
        }
        place = args.out / name.replace(", ", "-").replace(" ", "-")
        found = fedbn.compare(population, out=place, progress=False, eval_every=100, **(plan | settings | options))
        frame = found.evaluations
        return frame[(frame["row"] == "unseen") & (frame["column"] == "aggregated")]

    for number, tested in enumerate(folds(len(users))[: args.folds]):
        training = [i for i in range(len(users)) if i not in tested]
        inner = [users[i] for i in training]
        validation = left_out(inner, tuple(range(0, len(inner), 3)))
        scores = {}
        for name, settings in {"default": {}, **changes}.items():
            found = run(f"fold{number}/choice/{name}", validation, settings, strategies=["centralized"], seeds=1)
            scores[name] = float(found["accuracy"].mean())
            print(f"fold {number}, {name}: {scores[name]:.3f} on left-out training people", file=sys.stderr, flush=True)
        chosen = combine(scores)
        for name, settings in (("default", {}), ("chosen", together(chosen))):
            strategies = ["centralized", "global-naive"]
            place = f"fold{number}/test/{name}"
            found = run(place, left_out(users, tested), settings, strategies=strategies, seeds=args.seeds)
            rows.append(found.assign(fold=number, settings=name, chosen="+".join(chosen)))
            print(found.groupby("strategy")["accuracy"].agg(["mean", "min"]), file=sys.stderr, flush=True)
    table = pd.concat(rows)
    args.out.mkdir(parents=True, exist_ok=True)
    table.to_csv(args.out / "people.csv", index=False)
    table["correct"] = table["accuracy"] * table["n"]
    sums = table.groupby(["fold", "settings", "strategy", "seed"]).agg(
        windows=("n", "sum"), correct=("correct", "sum"), people=("accuracy", "mean"), worst=("accuracy", "min")
    )
    sums["accuracy"] = sums["correct"] / sums["windows"]
    summary = sums.groupby(["fold", "settings", "strategy"])[["accuracy", "people", "worst"]].agg(["mean", "std"])
    print(summary.round(4).to_string())
    print(json.dumps({"chosen": table.groupby("fold")["chosen"].first().to_dict()}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

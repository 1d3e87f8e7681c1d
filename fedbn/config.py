"""Options of a run. Each option is one dataclass field with its help text.

The command line, the Python API, run files and Flower's run config are derived from these fields. This module does not
import torch, so that the command line starts fast.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, field, fields
from typing import Any, Literal

from fedbn.errors import UserError, unknown

Weighting = Literal["samples", "uniform"]
Precision = Literal["float32", "bfloat16"]
ServerOptimizer = Literal["none", "fedavgm", "fedadam", "fedyogi", "fedadagrad"]

Panel = Literal["Data", "Federation", "Optimization", "Evaluation", "Output"]
"""Help panels of the command line."""


def option(
    default: Any = dataclasses.MISSING,
    help: str = "",
    *,
    panel: Panel = "Federation",
    low: float | None = None,
    above: float | None = None,
    below: float | None = None,
    flags: tuple[str, ...] = (),
    by_scenario: bool = False,
) -> Any:
    """A dataclass field with its help text and bounds.

    Args:
        default: value if not given; required if omitted. A mutable default is copied.
        help: help text of the command line.
        panel: help panel of the command line.
        low: smallest value.
        above: exclusive lower bound.
        below: exclusive upper bound.
        flags: names on the command line, if others than ``--name-of-field``.
        by_scenario: whether scenarios may have a default of their own.
    """
    metadata = {
        "help": help,
        "panel": panel,
        "low": low,
        "above": above,
        "below": below,
        "flags": flags,
        "by_scenario": by_scenario,
    }
    if isinstance(default, dict):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


class Checked:
    """Base of dataclasses whose fields have bounds (`option`)."""

    def __post_init__(self) -> None:
        for f in fields(self):  # type: ignore[arg-type]
            value = getattr(self, f.name)
            low, above, below = (f.metadata.get(bound) for bound in ("low", "above", "below"))
            if value is None or isinstance(value, tuple):
                continue
            if low is not None and not value >= low:
                raise UserError(f"{f.name} must be at least {low:g}, not {value}")
            if above is not None and not value > above:
                raise UserError(f"{f.name} must be positive, not {value}")
            if below is not None and not value < below:
                raise UserError(f"{f.name} must be below {below:g}, not {value}")


@dataclass(frozen=True)
class Plan(Checked):
    """How a run trains and evaluates. All strategies of a comparison share one plan.

    Raises:
        UserError: a value is out of bounds.

    >>> Plan(rounds=5).lr
    0.05
    """

    _: KW_ONLY
    rounds: int = option(20, "Communication rounds.", low=1, flags=("--rounds", "--num-rounds"), by_scenario=True)
    patience: int | None = option(
        None,
        "Stop training if the training loss has not improved by more than --min-delta in this number of evaluations; "
        "none trains for all rounds. Not used where training depends on the number of rounds (cosine, FixBN).",
        low=1,
    )
    min_delta: float = option(0.01, "Improvement of the training loss that counts for --patience.", low=0)
    clients_per_round: int | None = option(None, "Seen users sampled per round, seeded by round; none for all.", low=1)
    local_epochs: int = option(1, "Passes over a client's data per round.", low=1, by_scenario=True)
    batch_size: int = option(
        32,
        "Rows per step. A last batch of one row is merged into the previous batch.",
        low=1,
        panel="Optimization",
        by_scenario=True,
    )
    optimizer: str = option(
        "sgd",
        "Optimizer of the clients: sgd, adam, adamw:weight_decay=0.01, rmsprop, or package.module:factory, e.g. "
        "torch.optim:Adagrad.",
        panel="Optimization",
        by_scenario=True,
    )
    lr: float = option(
        0.05,
        "Learning rate of the clients. If only an optimizer is given, the optimizer's default.",
        above=0,
        panel="Optimization",
        by_scenario=True,
    )
    schedule: str = option(
        "constant",
        "Learning rate over the rounds: constant, cosine, or step:every=10:factor=0.1. With cosine, clients drift "
        "little at the end, so statistics measured before aggregation still fit after it.",
        panel="Optimization",
        by_scenario=True,
    )
    warmup: int = option(
        0, "Rounds in which the learning rate rises linearly, before the schedule.", low=0, panel="Optimization"
    )
    momentum: float = option(0.9, "Momentum of sgd.", low=0, below=1, panel="Optimization", by_scenario=True)
    weight_decay: float = option(0.0, "Weight decay of sgd.", low=0, panel="Optimization")
    max_grad_norm: float | None = option(
        None, "Largest norm of a client's gradient in a step; none for no clipping.", above=0, panel="Optimization"
    )
    optimizer_state: Literal["reset", "keep"] = option(
        "reset",
        "State of the optimizer, e.g. momentum: reset each round, or kept at the client (never sent).",
        panel="Optimization",
    )
    augment: str = option(
        "",
        "Augmentation of training batches, e.g. flip+jitter:scale=0.05, or package.module:callable; empty for none.",
        panel="Optimization",
    )
    weighting: Weighting = option("samples", "Weights of clients in the mean.")
    proximal: float = option(0.0, "FedProx's mu, on shared parameters; 0 disables it.", low=0, panel="Optimization")
    server_optimizer: ServerOptimizer = option(
        "none",
        "How the server applies the mean update to parameters (never to statistics).",
        panel="Optimization",
    )
    server_lr: float = option(1.0, "Learning rate of the server.", above=0, panel="Optimization")
    eval_every: int = option(
        5,
        "Rounds between evaluations of the learning curve; the last round is always evaluated.",
        low=1,
        panel="Evaluation",
    )
    global_test: int = option(
        400,
        "Rows of the pooled test set on which every client's model is also tested.",
        low=1,
        panel="Evaluation",
        by_scenario=True,
    )
    online_prior: float = option(
        256.0,
        "Weight of the source statistics in online adaptation, in windows.",
        low=0,
        panel="Evaluation",
    )
    tolerate: float = option(0.0, "Share of the sampled clients that may fail in a round.", low=0, below=1)
    user_batches: bool = option(
        False,
        "For centralized: each batch holds one user's rows, as on a client, and running statistics are averaged over "
        "users (Mazankiewicz et al. 2020).",
        panel="Optimization",
    )
    precision: Precision = option(
        "float32",
        "Precision of products and convolutions in training steps (torch.autocast). Parameters, statistics, losses, "
        "messages and evaluation stay float32.",
        panel="Optimization",
    )


@dataclass(frozen=True)
class ModelSplit(Checked):
    """Options that assign layers of a model to its head, or to the clients."""

    _: KW_ONLY
    head: str = option(
        "",
        "Layers that form the head, by path and comma-separated, e.g. fc or layer4,fc; empty for the last layer that "
        "computes the logits.",
    )
    private: str = option(
        "",
        "Layers whose entries stay local to each client under every strategy, by path and comma-separated.",
    )


@dataclass(frozen=True)
class Conditions(ModelSplit):
    """Options shared by `Run`, `Experiment` and `Study`."""

    scenario: str = option(help="Data set with users, e.g. hapt:unseen=10.", panel="Data")
    _: KW_ONLY
    model: str = option(
        "", "Built-in name or package.module:factory; empty for the scenario's model.", panel="Data", by_scenario=True
    )
    task: str = option(
        "",
        "Task, e.g. classification:balanced=true, regression:loss=huber, multilabel, or package.module:Class; empty "
        "for the scenario's task.",
        panel="Data",
        by_scenario=True,
    )
    partition: str = option(
        "natural",
        "How the data of seen users are split into clients, e.g. dirichlet:alpha=0.1:clients=20; natural keeps the "
        "users.",
        panel="Data",
    )
    shift: str = option("", "Feature shift between users, e.g. rotation:strength=0.5,gain.", panel="Data")
    device: str = option("cpu", "Device of all tensors, e.g. cuda:1.")
    privacy: str = option("", "Protection of clients' messages, e.g. clip=1:noise=0.5 or secure=true.")
    plan: Plan = field(default_factory=Plan)


@dataclass(frozen=True)
class EvaluatedConditions(Conditions):
    """Options shared by `Run` and `Experiment`, which have an online column."""

    _: KW_ONLY
    rule: str = option(
        "",
        "Online rule of the column 'adapted online', e.g. population:diversity=1; empty to update the statistics in "
        "blocks, with the weight of --online-prior.",
        panel="Evaluation",
    )


@dataclass(frozen=True)
class RunOptions(EvaluatedConditions):
    """Options of a `fedbn.federation.run.Run`."""

    strategy: str = option(help="Strategy, e.g. groupnorm:groups=4, or STRATEGY+METHOD, e.g. fedbn+ditto.")
    seed: int = option(0, "Seed of the unseen users, initial weights, sampling and shuffling.")
    _: KW_ONLY
    validation: bool = option(
        False, "Test on a held-out part of the training recordings (for tuning).", panel="Evaluation"
    )


def parts(text: str) -> tuple[str, ...]:
    """The parts of a comma-separated list.

    >>> parts("fedbn, silobn,")
    ('fedbn', 'silobn')
    """
    return tuple(filter(None, (part.strip() for part in text.split(","))))


def nest(kind: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """Move the options of `Plan` among flat options into a table ``plan``.

    Args:
        kind: a dataclass derived from `Conditions`.
        values: fields of ``kind`` and of `Plan` by name. A table ``plan`` may be among them; flat options win.

    Raises:
        UserError: an unknown option, with the nearest name.

    >>> nest(RunOptions, {"scenario": "hapt", "rounds": 3})
    {'scenario': 'hapt', 'plan': {'rounds': 3}}
    """
    own = [f.name for f in fields(kind)]
    if wrong := [name for name in values if name not in own and name not in PLAN_FIELDS]:
        raise unknown("option", wrong[0], [*own, *PLAN_FIELDS])
    nested = {name: value for name, value in values.items() if name in own}
    plan = {name: value for name, value in values.items() if name not in own}
    if plan and not isinstance(nested.get("plan", {}), dict):
        raise UserError("plan must be a table of settings such as {rounds = 5} where its options are also given")
    return nested | ({"plan": {**nested.get("plan", {}), **plan}} if plan else {})


def seed_numbers(seeds: int | tuple[int, ...]) -> tuple[int, ...]:
    """Seeds 0 to ``seeds`` - 1, or the given ones.

    Raises:
        UserError: no seed, a negative one, or one that is given twice.

    >>> seed_numbers(3), seed_numbers((4, 7))
    ((0, 1, 2), (4, 7))
    """
    found = tuple(range(seeds)) if isinstance(seeds, int) else seeds
    if not found or min(found) < 0 or len(set(found)) < len(found):
        raise UserError(f"seeds must be different whole numbers from 0, at least one, not {list(found)}")
    return found


PLAN_FIELDS = tuple(f.name for f in fields(Plan))

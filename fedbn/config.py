"""Options of a run. This module does not import torch, so that the command line starts fast."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Literal

from fedbn.errors import UserError

Weighting = Literal["samples", "uniform"]


Precision = Literal["float32", "bfloat16"]


ServerOptimizer = Literal["none", "fedavgm", "fedadam", "fedyogi", "fedadagrad"]


@dataclass(frozen=True)
class Plan:
    """How a run trains and evaluates; the same for every strategy of a comparison.

    Attributes:
        rounds: communication rounds.
        clients_per_round: seen users drawn a round (seeded by round); None for all.
        local_epochs: passes over a client's data a round.
        batch_size: rows a step; a last batch of one row joins the batch before it.
        lr: client learning rate (SGD).
        schedule: ``constant``, or ``cosine``: the rate falls along half a cosine over the rounds, so that clients
            drift little in the end and statistics gathered before aggregation still fit after it.
        momentum: of the client's SGD.
        weight_decay: of the client's SGD.
        optimizer_state: ``reset`` each round, or ``keep`` with the client (never sent).
        weighting: clients count by ``samples`` or ``uniform``.
        proximal: FedProx's mu, on shared parameters (0: off).
        server_optimizer: how the server applies the mean update to parameters (never to statistics).
        server_lr: its learning rate.
        eval_every: rounds between evaluations for the curve; the last round always counts.
        global_test: rows of the pooled test set every client's model is also tested on.
        online_prior: weight of the source statistics, in windows, when adapting online.
        tolerate: share of the clients asked whose failure is survived: the rest go on without them.
        user_batches: where one place trains on many users' data (``centralized``), every batch is of one user, as it
            is at a client anyhow, and running statistics are the mean over users of theirs (Mazankiewicz et al. 2020).
        precision: in which training steps compute products and convolutions, by ``torch.autocast``; parameters,
            statistics, losses, messages and evaluation stay float32.
    """

    rounds: int = 20
    clients_per_round: int | None = None
    local_epochs: int = 1
    batch_size: int = 32
    lr: float = 0.05
    schedule: Literal["constant", "cosine"] = "constant"
    momentum: float = 0.9
    weight_decay: float = 0.0
    optimizer_state: Literal["reset", "keep"] = "reset"
    weighting: Weighting = "samples"
    proximal: float = 0.0
    server_optimizer: ServerOptimizer = "none"
    server_lr: float = 1.0
    eval_every: int = 5
    global_test: int = 400
    online_prior: float = 256.0
    tolerate: float = 0.0
    user_batches: bool = False
    precision: Precision = "float32"

    def __post_init__(self) -> None:
        least: dict[str, float] = {
            "rounds": 1,
            "local_epochs": 1,
            "batch_size": 1,
            "eval_every": 1,
            "global_test": 1,
            "clients_per_round": 1,
            "momentum": 0,
            "weight_decay": 0,
            "proximal": 0,
            "online_prior": 0,
            "tolerate": 0,
        }
        for name, low in least.items():
            value = getattr(self, name)
            if value is not None and value < low:
                raise UserError(f"{name} must be at least {low:g}, not {value}")
        for name in ("lr", "server_lr"):
            if not getattr(self, name) > 0:
                raise UserError(f"{name} must be positive, not {getattr(self, name)}")
        if self.momentum >= 1:
            raise UserError(f"momentum must be below 1, not {self.momentum}")
        if not self.tolerate < 1:
            raise UserError(f"tolerate must be below 1, not {self.tolerate}: somebody has to answer")

    def rate(self, round: int) -> float:
        """Learning rate of a round, counted from 1.

        >>> plan = Plan(rounds=4, lr=0.1, schedule="cosine")
        >>> [round(plan.rate(r), 3) for r in (1, 3, 4)]
        [0.1, 0.05, 0.015]
        """
        if self.schedule == "constant":
            return self.lr
        return self.lr * (1 + math.cos(math.pi * (round - 1) / self.rounds)) / 2


PLAN_FIELDS = tuple(f.name for f in fields(Plan))

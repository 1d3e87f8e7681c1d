"""Diminishing BN: statistics averaged over the whole training (Ma, Klabjan).

Both readings of the paper: *algorithm 1* literally, the average normalizing in training too and the layer after the
activation; and the average serving *inference* only, while batches normalize in training. Every weight and schedule of
the paper's table; the error is that after the last epoch, its spread that over the epochs of the second half.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
from torch import nn

from fedbn.norms.dbn import DiminishingBN, Mode
from simulations.claims.claim import Claim
from simulations.claims.studies.common import DIGITS, accuracy, by_epoch, digits, seeded, shuffled, train

NUMERICS = 1
"""Version of this study's numbers; raise it when a change here changes results."""

ALPHAS = ("1", "0.75", "0.5", "0.25", "0.1", "0.01", "0.001", "1/m", "1/m^2", "0")


def _mlp(mode: Mode, alpha: str, seed: int) -> nn.Module:
    """Two hidden layers of 64, normalized after the ReLU as in the paper's equations."""

    def block(before: int) -> list[nn.Module]:
        return [nn.Linear(before, 64), nn.ReLU(), DiminishingBN(64, alpha=alpha, mode=mode)]

    with seeded(seed, "weights"):
        return nn.Sequential(nn.Flatten(), *block(64), *block(64), nn.Linear(64, 10))


def _errors(model: nn.Module, optimizer: torch.optim.Optimizer, epochs: int, seed: int, *, fall: float) -> list[float]:
    """Test error after every epoch; the rate is divided by 1 + step / ``fall``."""
    data, test = digits(seed)
    falling = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda m: 1 / (1 + m / fall))
    found = []
    for order in by_epoch(list(shuffled(len(data), 32, epochs, seed)), epochs):
        train(model, data, order, optimizer, scheduler=falling)
        found.append(1 - accuracy(model, test))
    return found


def _summary(errors: list[float]) -> dict[str, float]:
    return {"error": errors[-1], "spread over epochs": float(np.std(errors[len(errors) // 2 :], ddof=1))}


def algorithm1(arm: str, seed: int, quick: bool) -> dict[str, float]:
    """Plain SGD, rate 0.01 / (1 + m / 600); the arm is the schedule alpha."""
    model = _mlp("algorithm1", arm, seed)
    return _summary(_errors(model, torch.optim.SGD(model.parameters(), lr=0.01), 15 if quick else 30, seed, fall=600))


def inference(arm: str, seed: int, quick: bool) -> dict[str, float]:
    """AdaGrad 0.01; the arm is the schedule alpha."""
    model = _mlp("inference", arm, seed)
    optimizer = torch.optim.Adagrad(model.parameters(), lr=0.01)
    return _summary(_errors(model, optimizer, 8 if quick else 20, seed, fall=float("inf")))


claim = partial(
    Claim,
    source="Ma, Klabjan 2017, https://arxiv.org/abs/1705.08011",
    arms=ALPHAS,
    measure="error",
    meaning="test error, difference",
    threshold=0.0,
)
literal = partial(claim, setting=f"{DIGITS}; MLP with two hidden layers of 64, algorithm 1, SGD", run=algorithm1)
serving = partial(
    claim,
    setting=f"{DIGITS}; MLP with two hidden layers of 64, average used in inference only, AdaGrad; m counts steps",
    run=inference,
)

CLAIMS = (
    literal(
        name="dbn-quarter",
        sentence="A constant weight alpha = 0.25 ends at a lower error than alpha = 1.",
        published="MNIST error 2.70 % at alpha = 1, 1.91 % at 0.25 (table 1)",
        effect=lambda v: v["1"] - v["0.25"],
    ),
    literal(
        name="dbn-diminishing",
        sentence="The diminishing weight alpha = 1/m ends at a lower error than alpha = 1.",
        published="MNIST error 2.70 % at alpha = 1, 2.10 % at 1/m (table 1)",
        effect=lambda v: v["1"] - v["1/m"],
    ),
    literal(
        name="dbn-steady",
        sentence="With alpha = 0.25 the error varies less from epoch to epoch than with alpha = 1.",
        published="said, no number read",
        measure="spread over epochs",
        effect=lambda v: v["1"] - v["0.25"],
        meaning="standard deviation of the test error over epochs, alpha = 1 minus 0.25",
    ),
    serving(
        name="dbn-quarter-inference",
        sentence="A constant weight alpha = 0.25 beats alpha = 1 where batches normalize in training.",
        published="MNIST error 2.70 % at alpha = 1, 1.91 % at 0.25 (table 1; the paper leaves open which reading)",
        effect=lambda v: v["1"] - v["0.25"],
    ),
    serving(
        name="dbn-steady-inference",
        sentence="With alpha = 0.25 the error varies less from epoch to epoch where batches normalize in training.",
        published="said, no number read",
        measure="spread over epochs",
        effect=lambda v: v["1"] - v["0.25"],
        meaning="standard deviation of the test error over epochs, alpha = 1 minus 0.25",
    ),
    serving(
        name="dbn-never",
        sentence="Statistics kept from the first batch alone (alpha = 0) make the error at least ten times as large.",
        published="MNIST error 24.27 % at alpha = 0, 1.91 % at 0.25 (table 1)",
        effect=lambda v: v["0"] / max(v["0.25"], 1 / 450),
        meaning="error at alpha = 0 over error at 0.25",
        threshold=10.0,
    ),
)

"""Full normalisation: badly built batches (Lian, Liu).

Every batch holds only a few labels; statistics of a batch are then far from those of all data. The layer is a
reconstruction (`fedbn.norms.full_norm`).
"""

from __future__ import annotations

from functools import partial

import torch
from torch import nn
from torch.optim.lr_scheduler import PolynomialLR

from fedbn.norms.full_norm import FullNorm
from simulations.claims import Claim
from simulations.claims.bench import DIGITS, accuracy, digits, seeded, single_label, train


def _mlp(norm: str, seed: int) -> nn.Module:
    """Two hidden layers of 64."""

    def layer() -> nn.Module:
        match norm:
            case "FN":
                return FullNorm(64, a=0.03)
            case "BN":
                return nn.BatchNorm1d(64)
            case _:
                return nn.Identity()

    with seeded(seed, "weights"):
        return nn.Sequential(
            nn.Flatten(),
            nn.Linear(64, 64),
            layer(),
            nn.ReLU(),
            nn.Linear(64, 64),
            layer(),
            nn.ReLU(),
            nn.Linear(64, 10),
        )


def few_labels(arm: str, seed: int, quick: bool) -> dict[str, float]:
    """Test accuracy after plain SGD from 0.05 falling to 0, gradients clipped at 1, batches of 32 of some labels."""
    norm, _, labels = arm.partition(" ")
    data, test = digits(seed)
    model, steps = _mlp(norm, seed), 800 if quick else 3000
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    order = single_label(data.y, 32, int(labels), steps, seed)
    train(model, data, order, optimizer, scheduler=PolynomialLR(optimizer, steps), clip=1.0)
    return {"accuracy": accuracy(model, test)}


claim = partial(
    Claim,
    source="Lian, Liu 2019, https://arxiv.org/abs/1810.06177",
    setting=f"{DIGITS}; MLP with two hidden layers of 64, SGD, batches of 32, a = 0.03",
    published="not verified",
    run=few_labels,
    measure="accuracy",
)

CLAIMS = (
    claim(
        name="fn-one-label",
        sentence="With one label a batch BN fails and full normalisation trains.",
        arms=("FN 1", "BN 1"),
        effect=lambda v: v["FN 1"] - v["BN 1"],
        meaning="test accuracy with one label a batch, FN minus BN",
        threshold=0.3,
    ),
    claim(
        name="fn-two-labels",
        sentence="With two labels a batch full normalisation is more accurate than BN.",
        arms=("FN 2", "BN 2"),
        effect=lambda v: v["FN 2"] - v["BN 2"],
        meaning="test accuracy with two labels a batch, FN minus BN",
        threshold=0.0,
    ),
    claim(
        name="fn-all-labels",
        sentence="With mixed batches full normalisation is as accurate as BN.",
        arms=("FN 10", "BN 10"),
        effect=lambda v: v["FN 10"] - v["BN 10"],
        meaning="test accuracy with all labels in a batch, FN minus BN",
        threshold=-0.01,
    ),
)

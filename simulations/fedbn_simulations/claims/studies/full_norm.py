"""Full normalization with unbalanced batches (Lian, Liu).

Every batch has only a few labels, so its statistics differ from those of all data. First the gradient: a network at its
initial weights processes batches of one class each, in turn, and its mean gradient is compared with that of BN on all
data at once. Then training. The layer is a reconstruction (`fedbn.norms.full_norm`).
"""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import PolynomialLR

from fedbn.norms.full_norm import FullNorm
from fedbn_simulations.claims.claim import Claim
from fedbn_simulations.claims.studies.common import DIGITS, accuracy, digits, seeded, single_label, train

NUMERICS = 1


def _mlp(norm: str, seed: int, a: float = 0.03) -> nn.Module:
    """Two hidden layers of 64."""

    def hidden() -> list[nn.Module]:
        return [nn.Linear(64, 64), FullNorm(64, a=a) if norm == "FN" else nn.BatchNorm1d(64), nn.ReLU()]

    with seeded(seed, "weights"):
        return nn.Sequential(nn.Flatten(), *hidden(), *hidden(), nn.Linear(64, 10))


def few_labels(arm: str, seed: int, quick: bool) -> dict[str, float]:
    """Test accuracy with batches of 32 of a few labels; plain SGD, rate 0.05 decayed to 0, gradients clipped at 1."""
    norm, _, labels = arm.partition(" ")
    data, test = digits(seed)
    model, steps = _mlp(norm, seed), 800 if quick else 2000
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    order = single_label(data.y, 32, int(labels), steps, seed)
    train(model, data, order, optimizer, scheduler=PolynomialLR(optimizer, steps), clip=1.0)
    return {"accuracy": accuracy(model, test)}


def gradient_error(arm: str, seed: int, quick: bool) -> dict[str, float]:
    """Distance of the mean gradient over batches of one class each from that of all data, relative to its norm.

    The arm is a normalizer and the averaging rate; the weights are fixed. The first batches are a warm-up, until the
    initial averages are forgotten.
    """
    norm, _, rate = arm.partition(" ")
    data, _ = digits(seed)
    # The same number of rows for every class, so that the mean over classes is the mean over rows.
    rows = [(data.y == c).nonzero()[:, 0][:100] for c in range(10)]

    def gradient(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        model.zero_grad()
        F.cross_entropy(model.train()(data.x[batch]), data.y[batch]).backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    exact = gradient(_mlp("BN", seed), torch.cat(rows))
    model, a = _mlp(norm, seed, float(rate)), float(rate)
    warmup, measured = (math.ceil(k / a / 10) if norm == "FN" else 1 for k in (6, 2))
    total = torch.zeros_like(exact)
    for cycle in range(warmup + measured):
        for batch in rows:
            batch_gradient = gradient(model, batch)
            if cycle >= warmup:
                total += batch_gradient / (10 * measured)
    return {"gradient error": float((total - exact).norm() / exact.norm())}


claim = partial(
    Claim,
    source="Lian, Liu 2019, https://arxiv.org/abs/1810.06177",
    setting=f"{DIGITS}; MLP with two hidden layers of 64, SGD, batches of 32, a = 0.03",
    published="not verified",
    run=few_labels,
    measure="accuracy",
)

RATES = ("1", "0.3", "0.1", "0.03", "0.01")
of_gradients = partial(
    claim,
    setting=f"{DIGITS}; the same MLP at its initial weights, batches of 100 of one class in turn",
    run=gradient_error,
    arms=tuple(f"{norm} {rate}" for norm in ("FN", "BN") for rate in RATES),
    measure="gradient error",
    drawing="curves",
    axis="averaging rate a",
)

CLAIMS = (
    of_gradients(
        name="fn-gradient",
        sentence="Full normalization follows the gradient of all data although every batch has a single class.",
        effect=lambda v: v["BN 0.01"] - v["FN 0.01"],
        meaning="relative error of the mean gradient, BN minus FN with a = 0.01",
        threshold=0.5,
    ),
    of_gradients(
        name="fn-gradient-rate",
        sentence="The error of full normalization is proportional to the averaging rate.",
        source="derived here (`fedbn.norms.full_norm`)",
        effect=lambda v: v["FN 0.1"] / v["FN 0.01"],
        meaning="relative error of the mean gradient, a = 0.1 over a = 0.01",
        threshold=5.0,
    ),
    claim(
        name="fn-one-label",
        sentence="With one label per batch, BN fails and full normalization trains.",
        arms=("FN 1", "BN 1"),
        effect=lambda v: v["FN 1"] - v["BN 1"],
        meaning="test accuracy with one label per batch, FN minus BN",
        threshold=0.3,
    ),
    claim(
        name="fn-two-labels",
        sentence="With two labels per batch, full normalization is more accurate than BN.",
        arms=("FN 2", "BN 2"),
        effect=lambda v: v["FN 2"] - v["BN 2"],
        meaning="test accuracy with two labels per batch, FN minus BN",
        threshold=0.0,
    ),
    claim(
        name="fn-all-labels",
        sentence="With mixed batches, full normalization is as accurate as BN.",
        arms=("FN 10", "BN 10"),
        effect=lambda v: v["FN 10"] - v["BN 10"],
        meaning="test accuracy with all labels in a batch, FN minus BN",
        threshold=-0.01,
    ),
)

"""Binary networks need BN's scaling (Sari et al.).

Binary weights and activations with straight-through estimators. Measures gradients at initialization and accuracy after
training of an MLP and a CNN with BN, one half of it, or none. See `fedbn.models.binary` for the growth law.
"""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import nn

from fedbn.models.binary import BINARY_NORMS, BinaryCNN, BinaryLinear, BinaryMLP
from fedbn.nn.probes import GradientGrowthProbe
from fedbn_simulations.claims.claim import Claim
from fedbn_simulations.claims.studies.common import DIGITS, accuracy, digits, seeded, shuffled, train

NUMERICS = 1

WIDTH = 128


def growth(arm: str, seed: int, quick: bool) -> dict[str, float]:
    """Mean growth of the gradient per layer towards the input in networks of 8 binary layers at initialization."""
    growths = []
    for i in range(4 if quick else 16):
        with seeded(seed, "growth", i):
            model = BinaryMLP((WIDTH,), 10, norm=arm, width=WIDTH, depth=8)  # type: ignore[arg-type]
            x, out = torch.randn(256, WIDTH), torch.randn(256, WIDTH)
        layers = {n: m for n, m in model.named_modules() if isinstance(m, BinaryLinear)}
        with GradientGrowthProbe(layers) as probe:
            (model.hidden(x) * out).sum().backward()
        growths.append(probe.growth)
    return {"growth per layer": sum(growths) / len(growths)}


def learning(arm: str, seed: int, quick: bool) -> dict[str, float]:
    """Test accuracy of 4 binary layers of 128."""
    with seeded(seed, "weights"):
        model = BinaryMLP((1, 8, 8), 10, norm=arm, width=WIDTH)  # type: ignore[arg-type]
    return _fit(model, 10 if quick else 40, seed)


def convolving(arm: str, seed: int, quick: bool) -> dict[str, float]:
    """Test accuracy of 3 binary convolutions (32, 64, 64)."""
    with seeded(seed, "weights"):
        model = BinaryCNN((1, 8, 8), 10, norm=arm)  # type: ignore[arg-type]
    return _fit(model, 4 if quick else 10, seed)


def _fit(model: nn.Module, epochs: int, seed: int) -> dict[str, float]:
    data, test = digits(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.003)
    train(model, data, shuffled(len(data), 64, epochs, seed), optimizer)
    return {"accuracy": accuracy(model, test)}


LAW = (2 * WIDTH / math.pi) ** 0.25
claim = partial(
    Claim,
    source="Sari, Belbahri, Partovi Nia 2019, https://arxiv.org/abs/1909.09139",
    published="not verified (only the abstract was read)",
    arms=BINARY_NORMS,
)
of_gradients = partial(claim, run=growth, measure="growth per layer")
of_training = partial(
    claim,
    setting=f"{DIGITS}; binary MLP, 4 layers of {WIDTH}, Adam 0.003",
    run=learning,
    measure="accuracy",
    threshold=0.1,
)
of_convolutions = partial(of_training, setting=f"{DIGITS}; binary CNN (32-64-64), Adam 0.003", run=convolving)

CLAIMS = (
    of_gradients(
        name="binary-explosion",
        sentence="Without normalization the gradients of a binary network explode, by (2K/pi)^(1/4) per layer.",
        setting=f"random inputs, 8 binary layers of {WIDTH} at initialization; the growth law is derived here",
        effect=lambda v: -abs(v["none"] / LAW - 1),
        meaning=f"negative relative deviation from {LAW:.3f}",
        threshold=-0.05,
    ),
    of_gradients(
        name="binary-bn-tames",
        sentence="BN prevents exploding gradients in a binary network.",
        setting=f"random inputs, 8 binary layers of {WIDTH} at initialization",
        effect=lambda v: 1 - v["bn"],
        meaning="1 minus the growth per layer",
        threshold=0.0,
    ),
    of_training(
        name="binary-training",
        sentence="Binary networks fail to train well without BN.",
        effect=lambda v: v["bn"] - v["none"],
        meaning="test accuracy, BN minus none",
    ),
    of_training(
        name="binary-scale",
        sentence="Binary networks need the scaling of BN, not the centering.",
        effect=lambda v: v["scale"] - v["center"],
        meaning="test accuracy, only scaling minus only centering",
    ),
    of_convolutions(
        name="binary-training-cnn",
        sentence="Binary convolutional networks fail to train well without BN.",
        effect=lambda v: v["bn"] - v["none"],
        meaning="test accuracy, BN minus none",
    ),
    of_convolutions(
        name="binary-scale-cnn",
        sentence="Binary convolutional networks need the scaling of BN, not the centering.",
        effect=lambda v: v["scale"] - v["center"],
        meaning="test accuracy, only scaling minus only centering",
    ),
    of_training(
        name="binary-fixed",
        sentence="Division by the square root of the fan-in, without statistics, can replace BN in a binary network.",
        effect=lambda v: v["fixed"] - v["bn"],
        meaning="test accuracy, fixed scale minus BN",
        threshold=-0.03,
    ),
)

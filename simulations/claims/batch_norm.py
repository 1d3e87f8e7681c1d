"""Batch normalisation itself.

What everybody says of BN (Ioffe, Szegedy, 2015; Wu, He, 2018), on networks that train in seconds.
"""

from __future__ import annotations

from functools import partial
from typing import cast

import torch
from torch import nn

from fedbn.layers import convert, norm_layers
from fedbn.models.small_cnn import SmallCNN
from simulations.claims import Claim
from simulations.claims.bench import DIGITS, accuracy, digits, seeded, shuffled, train


def _cnn(norm: str, seed: int) -> nn.Module:
    with seeded(seed, "weights"):
        model: nn.Module = SmallCNN((1, 8, 8), 10)
    if norm == "group":
        return convert(model, "group", groups=4)
    return model if norm == "bn" else convert(model, "none")


def _mlp(norm: str, seed: int) -> nn.Module:
    """Three hidden layers of 64, weights as He et al. initialise them: torch's own stall a network without BN."""
    layers: list[nn.Module] = [nn.Flatten()]
    for _ in range(3):
        layers += [nn.Linear(64, 64), nn.BatchNorm1d(64) if norm == "bn" else nn.Identity(), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Linear(64, 10))
    with seeded(seed, "weights"):
        for layer in model:
            if isinstance(layer, nn.Linear):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
                nn.init.zeros_(layer.bias)
    return model


def rates(arm: str, seed: int, quick: bool) -> dict[str, float]:
    """Largest learning rate, among powers of two, with which plain SGD still reaches 90 % on the training data.

    Raises:
        ValueError: no rate does.
    """
    data, _ = digits(seed)
    for exponent in range(8, -7, -1):
        model = _mlp(arm, seed)
        optimizer = torch.optim.SGD(model.parameters(), lr=2.0**exponent)
        train(model, data, shuffled(len(data), 64, 10 if quick else 20, seed), optimizer)
        if accuracy(model, data) >= 0.9:
            return {"largest stable rate, log2": float(exponent)}
    raise ValueError(f"{arm}: no rate trains")


def speed(arm: str, seed: int, quick: bool) -> dict[str, float]:
    """Test accuracy after a single epoch at a common learning rate."""
    data, test = digits(seed)
    model = _mlp(arm, seed)
    train(model, data, shuffled(len(data), 64, 1, seed), torch.optim.SGD(model.parameters(), lr=0.1))
    return {"accuracy": accuracy(model, test)}


def small_batches(arm: str, seed: int, quick: bool) -> dict[str, float]:
    """Test accuracy with batches of 2 or 32; the learning rate is proportional to the batch."""
    norm, _, size = arm.partition(" ")
    data, test = digits(seed)
    model = _cnn(norm, seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.001 * int(size), momentum=0.9)
    train(model, data, shuffled(len(data), int(size), 3 if quick else 10, seed), optimizer)
    return {"accuracy": accuracy(model, test)}


def epsilon(arm: str, seed: int, quick: bool) -> dict[str, float]:
    """Test accuracy with the constant in the denominator as the arm says."""
    data, test = digits(seed)
    model = _cnn("bn", seed)
    for layer in norm_layers(model).values():
        cast(nn.BatchNorm2d, layer).eps = float(arm)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    train(model, data, shuffled(len(data), 32, 4 if quick else 15, seed), optimizer)
    return {"accuracy": accuracy(model, test)}


IOFFE = "Ioffe, Szegedy 2015, https://arxiv.org/abs/1502.03167"
claim = partial(Claim, published="not verified")

CLAIMS = (
    claim(
        name="bn-learning-rate",
        sentence="BN tolerates learning rates at least three times as large.",
        source=IOFFE,
        setting=f"{DIGITS}; MLP with three hidden layers of 64, SGD, rates 2^-6 to 2^8",
        run=rates,
        arms=("bn", "none"),
        measure="largest stable rate, log2",
        effect=lambda v: v["bn"] - v["none"],
        meaning="doublings of the largest rate that still trains, BN minus none",
        threshold=1.585,
    ),
    claim(
        name="bn-speed",
        sentence="With BN the network learns faster.",
        source=IOFFE,
        setting=f"{DIGITS}; the same MLP, one epoch at learning rate 0.1",
        run=speed,
        arms=("bn", "none"),
        measure="accuracy",
        effect=lambda v: v["bn"] - v["none"],
        meaning="test accuracy after one epoch, BN minus none",
        threshold=0.0,
    ),
    claim(
        name="bn-small-batch",
        sentence="BN suffers from batches of 2 more than group normalisation does.",
        source="Wu, He 2018, https://arxiv.org/abs/1803.08494",
        setting=f"{DIGITS}; small-cnn, learning rate 0.001 times the batch",
        run=small_batches,
        arms=("bn 32", "bn 2", "group 32", "group 2"),
        measure="accuracy",
        effect=lambda v: (v["bn 32"] - v["bn 2"]) - (v["group 32"] - v["group 2"]),
        meaning="accuracy lost from batches of 32 to 2, BN minus GN",
        threshold=0.0,
    ),
    claim(
        name="bn-epsilon",
        sentence="Any eps from 1e-5 to 1e-3 will do.",
        source="practice; no paper",
        setting=f"{DIGITS}; small-cnn",
        run=epsilon,
        arms=("1e-5", "1e-3"),
        measure="accuracy",
        effect=lambda v: -abs(v["1e-5"] - v["1e-3"]),
        meaning="minus the difference in accuracy",
        threshold=-0.01,
    ),
)

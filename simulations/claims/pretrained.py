"""Networks with BN on the data (Simon et al.).

AlexNet as published with BN, at an eighth of its width and with a stem for small images; ImageNet is not at hand.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn
from torch.optim.lr_scheduler import PolynomialLR

from fedbn.layers import replace_norms
from fedbn.models.cvgj import AlexNetCvgj
from fedbn.scenario import Examples
from simulations.claims import Claim
from simulations.claims.bench import DIGITS, accuracy, digits, seeded, shuffled, train


def _alexnet(norm: str, seed: int) -> nn.Module:
    """With BN, or as before BN: none of it, dropout behind the two hidden layers."""
    with seeded(seed, "weights"):
        model = AlexNetCvgj((1, 8, 8), 10, width_mult=1 / 8)
    if norm == "bn":
        return model
    return replace_norms(model, lambda path, _: nn.Dropout(0.5) if path.startswith("hidden") else nn.Identity())


def learning(arm: str, seed: int, quick: bool) -> dict[str, float]:
    """Test error after SGD with momentum 0.9 and a rate that falls linearly to 0 ("poly" of power 1)."""
    norm, _, rate = arm.partition(" ")
    data, test = digits(seed)
    model = _alexnet(norm, seed)
    order = list(shuffled(len(data), 64, 4 if quick else 15, seed))
    optimizer = torch.optim.SGD(model.parameters(), lr=float(rate), momentum=0.9, weight_decay=5e-4)
    with seeded(seed, "dropout"):
        train(model, data, order, optimizer, scheduler=PolynomialLR(optimizer, len(order)))
    return {"error": 1 - accuracy(model, test)}


def contrast(arm: str, seed: int, quick: bool) -> dict[str, float]:
    """Test error on images of another camera, x -> 3 x + 5, with the statistics of the data's BN taken anew or not."""
    data, test = digits(seed)
    model = _alexnet("bn", seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    train(model, data, shuffled(len(data), 64, 4 if quick else 15, seed), optimizer)
    other = Examples(3 * test.x + 5, test.y, test.recording)
    if arm == "measured anew":
        first = model.get_submodule("data")
        first.reset_running_stats()  # type: ignore[operator]
        first.momentum = None  # type: ignore[assignment]
        first.train()
        with torch.no_grad():
            first(other.x)
    return {"error": 1 - accuracy(model, test if arm == "same camera" else other)}


PAIRS = {"dropout": ("0.003", "0.01", "0.03", "0.1"), "bn": ("0.015", "0.05", "0.15", "0.5")}


def at_best_rate(errors: Mapping[str, float]) -> float:
    """Dropout gets the rate that suits it best on the test data; BN five times that, whatever it does there."""
    best = min(range(4), key=lambda i: errors[f"dropout {PAIRS['dropout'][i]}"])
    return errors[f"dropout {PAIRS['dropout'][best]}"] - errors[f"bn {PAIRS['bn'][best]}"]


SOURCE = "Simon, Rodner, Denzler 2016, https://arxiv.org/abs/1612.01452"

CLAIMS = (
    Claim(
        name="pretrained-rate",
        sentence="At five times the learning rate, BN without dropout ends at a lower error than no BN with dropout.",
        source=SOURCE,
        published="ImageNet top-1 error of AlexNet: 39.9 % with BN, 42.6 % the original (authors' page)",
        setting=f"{DIGITS}; AlexNet at 1/8 width, poly schedule",
        run=learning,
        arms=tuple(f"{norm} {rate}" for norm in PAIRS for rate in PAIRS[norm]),
        measure="error",
        effect=at_best_rate,
        meaning="test error, dropout at its best rate minus BN at five times that rate",
        threshold=0.0,
    ),
    Claim(
        name="pretrained-data-bn",
        sentence="BN on the data makes mean subtraction needless: another gain and offset cost nothing once its "
        "statistics are measured.",
        source=SOURCE,
        published="'no mean subtraction is required' (authors' page), no number",
        setting=f"{DIGITS}; AlexNet at 1/8 width; test images x -> 3 x + 5, one layer's statistics measured anew",
        run=contrast,
        arms=("same camera", "measured anew", "as trained"),
        measure="error",
        effect=lambda v: v["same camera"] - v["measured anew"],
        meaning="test error, same camera minus other camera with the data's statistics measured",
        threshold=-0.01,
    ),
)

"""Pre-trained networks with BN, including BN of the data (Simon et al.).

AlexNet as published with BN, with an eighth of its width and a stem for small images. Instead of ImageNet, five digit
domains are used for pre-training, and the sixth, with a hundred labeled images, is the target task. To load ImageNet
weights, see `fedbn.integrations.pretrained`.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import partial

import torch
from torch import nn
from torch.optim.lr_scheduler import PolynomialLR

from fedbn.data.population import Examples
from fedbn.models.cvgj import AlexNetCvgj
from fedbn.nn.conversion import replace_norms
from fedbn.statistics.recalibration import recalibrate
from fedbn_simulations.claims.claim import Claim
from fedbn_simulations.claims.studies.common import (
    DIGITS,
    DOMAINS,
    SIX_DOMAINS,
    accuracy,
    digit_domains,
    digits,
    seeded,
    shuffled,
    train,
)

NUMERICS = 2


def _alexnet(norm: str, seed: int) -> nn.Module:
    """AlexNet with BN, or without BN and with dropout after the two hidden layers, as it was before BN."""
    with seeded(seed, "weights"):
        model = AlexNetCvgj((1, 8, 8), 10, width_mult=1 / 8)
    if norm == "bn":
        return model
    return replace_norms(model, lambda path, _: nn.Dropout(0.5) if path.startswith("hidden") else nn.Identity())


def learning(arm: str, seed: int, quick: bool) -> dict[str, float]:
    """Test error after SGD with momentum 0.9 and a linear decay of the rate to 0 ("poly" of power 1)."""
    norm, _, rate = arm.partition(" ")
    data, test = digits(seed)
    model = _alexnet(norm, seed)
    order = list(shuffled(len(data), 64, 4 if quick else 8, seed))
    optimizer = torch.optim.SGD(model.parameters(), lr=float(rate), momentum=0.9, weight_decay=5e-4)
    with seeded(seed, "dropout"):
        train(model, data, order, optimizer, scheduler=PolynomialLR(optimizer, len(order)))
    return {"error": 1 - accuracy(model, test)}


def contrast(arm: str, seed: int, quick: bool) -> dict[str, float]:
    """Test error on images of another camera, x -> 3 x + 5, with or without new statistics for the BN of the data."""
    data, test = digits(seed)
    model = _alexnet("bn", seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    train(model, data, shuffled(len(data), 64, 4 if quick else 8, seed), optimizer)
    other_camera = Examples(3 * test.x + 5, test.y, test.recording)
    if arm == "measured anew":
        data_norm = model.get_submodule("data")
        data_norm.reset_running_stats()  # type: ignore[operator]
        data_norm.momentum = None  # type: ignore[assignment]
        data_norm.train()
        with torch.no_grad():
            data_norm(other_camera.x)
    return {"error": 1 - accuracy(model, test if arm == "same camera" else other_camera)}


def transfer(arm: str, seed: int, quick: bool) -> dict[str, float]:
    """Test error on a target domain (selected by the seed) with 100 labeled images; the arm is the first training.

    Variants of the pre-trained network: unchanged; with statistics recalibrated on these images without labels; with
    only the classifier trained; fine-tuned completely.
    """
    domains, target = digit_domains(), DOMAINS[seed % 6]
    few = domains[target][0].take(torch.arange(100))
    test = domains[target][1]
    with seeded(seed, "weights"):
        model = AlexNetCvgj((3, 14, 14), 10, width_mult=1 / 8)
    if arm == "from scratch":
        return {"error: from scratch": 1 - accuracy(_fit(model, few, 20 if quick else 40, 0.05, seed), test)}
    other_domains = Examples.concat([train_set for name, (train_set, _) in domains.items() if name != target])
    _fit(model, other_domains, 2 if quick else 3, 0.05, seed)
    frozen = copy.deepcopy(model).eval()
    with torch.no_grad():
        features = frozen.hidden(frozen.features(frozen.data(few.x)).flatten(1))
    _fit(frozen.classifier, Examples(features, few.y, few.recording), 20 if quick else 40, 0.05, seed)
    tuned = _fit(copy.deepcopy(model), few, 20 if quick else 40, 0.01, seed)
    recalibrated = recalibrate(copy.deepcopy(model), few.x)
    models = {"as it is": model, "statistics": recalibrated, "classifier": frozen, "fine-tuned": tuned}
    return {f"error: {arm}": 1 - accuracy(net, test) for arm, net in models.items()}


def _fit(model: nn.Module, data: Examples, epochs: int, rate: float, seed: int) -> nn.Module:
    """Train ``model`` with SGD, momentum 0.9, the poly schedule and batches of 50."""
    order = list(shuffled(len(data), 50, epochs, seed))
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9, weight_decay=5e-4)
    return train(model, data, order, optimizer, scheduler=PolynomialLR(optimizer, len(order)))


PAIRS = {"dropout": ("0.003", "0.01", "0.03", "0.1"), "bn": ("0.015", "0.05", "0.15", "0.5")}


def at_best_rate(errors: Mapping[str, float]) -> float:
    """Test error of dropout at its best rate on the test data, minus that of BN at five times this rate."""
    best = min(range(4), key=lambda i: errors[f"dropout {PAIRS['dropout'][i]}"])
    return errors[f"dropout {PAIRS['dropout'][best]}"] - errors[f"bn {PAIRS['bn'][best]}"]


VARIANTS = ("from scratch", "as it is", "statistics", "classifier", "fine-tuned")
claim = partial(
    Claim, source="Simon, Rodner, Denzler 2016, https://arxiv.org/abs/1612.01452", measure="error", threshold=0.0
)
to_a_new_task = partial(
    claim,
    published="not verified",
    setting=f"{SIX_DOMAINS}; pre-training of AlexNet at 1/8 width on five, 100 labeled images of the sixth",
    run=transfer,
    arms=VARIANTS,
    trained=lambda arm: arm if arm == "from scratch" else "elsewhere",
)

CLAIMS = (
    claim(
        name="pretrained-rate",
        sentence="At five times the learning rate, BN without dropout ends at a lower error than no BN with dropout.",
        published="ImageNet top-1 error of AlexNet: 39.9 % with BN, 42.6 % the original (authors' page)",
        setting=f"{DIGITS}; AlexNet at 1/8 width, poly schedule",
        run=learning,
        arms=tuple(f"{norm} {rate}" for norm in PAIRS for rate in PAIRS[norm]),
        drawing="curves",
        axis="initial learning rate",
        effect=at_best_rate,
        meaning="test error, dropout at its best rate minus BN at five times that rate",
    ),
    claim(
        name="pretrained-data-bn",
        sentence="BN of the data makes mean subtraction unnecessary: a different gain and offset cost no accuracy once "
        "its statistics are estimated.",
        published="'no mean subtraction is required' (authors' page), no number",
        setting=f"{DIGITS}; AlexNet at 1/8 width; test images x -> 3 x + 5, first layer's statistics estimated again",
        run=contrast,
        arms=("same camera", "measured anew", "as trained"),
        effect=lambda v: v["same camera"] - v["measured anew"],
        meaning="test error, same camera minus other camera with new statistics of the data",
        threshold=-0.01,
    ),
    to_a_new_task(
        name="pretrained-transfer",
        sentence="With few labels, fine-tuning a network pre-trained with BN beats training from scratch.",
        effect=lambda v: v["from scratch"] - v["fine-tuned"],
        meaning="test error, from scratch minus fine-tuned",
    ),
    to_a_new_task(
        name="pretrained-freezing",
        sentence="Fine-tuning all layers beats training the classifier on frozen layers and statistics.",
        source="common practice, no paper",
        published="no number",
        effect=lambda v: v["classifier"] - v["fine-tuned"],
        meaning="test error, only the classifier trained minus fine-tuned",
    ),
    to_a_new_task(
        name="pretrained-statistics",
        sentence="Recalibrating the statistics on unlabeled images improves a pre-trained network on a new domain.",
        source="Li, Wang, Shi, Liu, Hou 2016, https://arxiv.org/abs/1603.04779",
        effect=lambda v: v["as it is"] - v["statistics"],
        meaning="test error, unchanged minus with statistics of a hundred unlabeled images of the new domain",
    ),
)

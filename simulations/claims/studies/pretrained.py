"""Networks with BN on the data (Simon et al.).

AlexNet as published with BN, at an eighth of its width and with a stem for small images; ImageNet is not at hand, so
five digit domains stand for it and the sixth, with a hundred labeled images, for the task that weights are brought to.
Weights of ImageNet, for those who have them: `fedbn.integrations.pretrained`.
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
from simulations.claims.claim import Claim
from simulations.claims.studies.common import (
    DIGITS,
    DOMAINS,
    SIX,
    accuracy,
    digit_domains,
    digits,
    seeded,
    shuffled,
    train,
)

NUMERICS = 1
"""Version of this study's numbers; raise it when a change here changes results."""


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
    order = list(shuffled(len(data), 64, 4 if quick else 8, seed))
    optimizer = torch.optim.SGD(model.parameters(), lr=float(rate), momentum=0.9, weight_decay=5e-4)
    with seeded(seed, "dropout"):
        train(model, data, order, optimizer, scheduler=PolynomialLR(optimizer, len(order)))
    return {"error": 1 - accuracy(model, test)}


def contrast(arm: str, seed: int, quick: bool) -> dict[str, float]:
    """Test error on images of another camera, x -> 3 x + 5, with the statistics of the data's BN taken anew or not."""
    data, test = digits(seed)
    model = _alexnet("bn", seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    train(model, data, shuffled(len(data), 64, 4 if quick else 8, seed), optimizer)
    other = Examples(3 * test.x + 5, test.y, test.recording)
    if arm == "measured anew":
        first = model.get_submodule("data")
        first.reset_running_stats()  # type: ignore[operator]
        first.momentum = None  # type: ignore[assignment]
        first.train()
        with torch.no_grad():
            first(other.x)
    return {"error": 1 - accuracy(model, test if arm == "same camera" else other)}


def transfer(arm: str, seed: int, quick: bool) -> dict[str, float]:
    """Test error on a domain (the seed says which) with 100 labeled images of it, the arm being what is trained first.

    From the pre-trained network: as it is; with statistics measured again on those images, without their labels; with
    everything frozen but the classifier; all of it trained on.
    """
    domains, away = digit_domains(), DOMAINS[seed % 6]
    few = domains[away][0].take(torch.arange(100))
    test = domains[away][1]
    with seeded(seed, "weights"):
        model = AlexNetCvgj((3, 14, 14), 10, width_mult=1 / 8)
    if arm == "from scratch":
        return {"error: from scratch": 1 - accuracy(_descended(model, few, 20 if quick else 40, 0.05, seed), test)}
    elsewhere = Examples.concat([train_part for name, (train_part, _) in domains.items() if name != away])
    _descended(model, elsewhere, 2 if quick else 3, 0.05, seed)
    frozen = copy.deepcopy(model).eval()
    with torch.no_grad():
        features = frozen.hidden(frozen.features(frozen.data(few.x)).flatten(1))
    _descended(frozen.classifier, Examples(features, few.y, few.recording), 20 if quick else 40, 0.05, seed)
    tuned = _descended(copy.deepcopy(model), few, 20 if quick else 40, 0.01, seed)
    again = recalibrate(copy.deepcopy(model), few.x)
    by_way = {"as it is": model, "statistics": again, "classifier": frozen, "fine-tuned": tuned}
    return {f"error: {way}": 1 - accuracy(net, test) for way, net in by_way.items()}


def _descended(model: nn.Module, data: Examples, epochs: int, rate: float, seed: int) -> nn.Module:
    """``model`` after SGD with momentum 0.9 and the poly schedule, batches of 50."""
    order = list(shuffled(len(data), 50, epochs, seed))
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9, weight_decay=5e-4)
    return train(model, data, order, optimizer, scheduler=PolynomialLR(optimizer, len(order)))


PAIRS = {"dropout": ("0.003", "0.01", "0.03", "0.1"), "bn": ("0.015", "0.05", "0.15", "0.5")}


def at_best_rate(errors: Mapping[str, float]) -> float:
    """Dropout gets the rate that suits it best on the test data; BN five times that, whatever it does there."""
    best = min(range(4), key=lambda i: errors[f"dropout {PAIRS['dropout'][i]}"])
    return errors[f"dropout {PAIRS['dropout'][best]}"] - errors[f"bn {PAIRS['bn'][best]}"]


SOURCE = "Simon, Rodner, Denzler 2016, https://arxiv.org/abs/1612.01452"

WAYS = ("from scratch", "as it is", "statistics", "classifier", "fine-tuned")
to_a_new_task = partial(
    Claim,
    source=SOURCE,
    published="not verified",
    setting=f"{SIX}; five train AlexNet at 1/8 width, the sixth has 100 labeled images",
    run=transfer,
    arms=WAYS,
    trained=lambda arm: arm if arm == "from scratch" else "elsewhere",
    measure="error",
    threshold=0.0,
)

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
        drawing="curves",
        axis="first learning rate",
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
    to_a_new_task(
        name="pretrained-transfer",
        sentence="With few labels, fine-tuning a network pre-trained with BN beats training one from scratch.",
        effect=lambda v: v["from scratch"] - v["fine-tuned"],
        meaning="test error, from scratch minus fine-tuned",
    ),
    to_a_new_task(
        name="pretrained-freezing",
        sentence="Fine-tuning everything beats training the classifier on frozen layers and statistics.",
        source="practice; no paper",
        published="no number",
        effect=lambda v: v["classifier"] - v["fine-tuned"],
        meaning="test error, classifier alone minus fine-tuned",
    ),
    to_a_new_task(
        name="pretrained-statistics",
        sentence="Statistics measured again on unlabeled images make a pre-trained network fit a new domain better.",
        source="Li, Wang, Shi, Liu, Hou 2016, https://arxiv.org/abs/1603.04779",
        effect=lambda v: v["as it is"] - v["statistics"],
        meaning="test error, as it is minus with statistics of a hundred unlabeled images of the new domain",
    ),
)

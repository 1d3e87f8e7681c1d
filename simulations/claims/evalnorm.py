"""EvalNorm: in evaluation a sample counts in its statistics as it did in training (Singh, Shrivastava).

Batches of two, where it matters most.
"""

from __future__ import annotations

import copy
from functools import partial

import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import CosineAnnealingLR

from fedbn.layers import convert
from fedbn.models.small_cnn import SmallCNN
from fedbn.scenario import Examples
from simulations.claims import Claim
from simulations.claims.bench import DIGITS, accuracy, digits, seeded, shuffled, train

SIZE = 2


def _training_loss(model: nn.Module, data: Examples, seed: int) -> float:
    """Mean cross-entropy as training sees it: batches of two normalised by themselves."""
    twin = copy.deepcopy(model).train()
    order = list(shuffled(len(data), SIZE, 1, seed))
    with torch.no_grad():
        losses = [F.cross_entropy(twin(data.x[rows]), data.y[rows], reduction="sum") for rows in order]
    return float(torch.stack(losses).sum()) / len(data)


def tiny_batches(arm: str, seed: int, quick: bool) -> dict[str, float]:
    """Test error, and how far the loss in evaluation is from that in training, both on the training data."""
    data, test = digits(seed)
    with seeded(seed, "weights"):
        model: nn.Module = SmallCNN((1, 8, 8), 10)
    order = list(shuffled(len(data), SIZE, 2 if quick else 8, seed))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.005, momentum=0.9)
    train(model, data, order, optimizer, scheduler=CosineAnnealingLR(optimizer, len(order)))
    if arm != "running":
        convert(model, "evalnorm", rule=arm, size=SIZE)
    in_training = _training_loss(model, data, seed)
    model.eval()
    with torch.no_grad():
        in_evaluation = float(F.cross_entropy(model(data.x), data.y))
    return {"error": 1 - accuracy(model, test), "gap of the loss": abs(in_evaluation - in_training)}


claim = partial(
    Claim,
    source="Singh, Shrivastava 2019, https://arxiv.org/abs/1904.06031",
    setting=f"{DIGITS}; small-cnn trained with batches of two",
    run=tiny_batches,
)

CLAIMS = (
    claim(
        name="evalnorm-gap",
        sentence="EvalNorm removes more than half of the difference between training and evaluation.",
        published="no such number",
        arms=("running", "1/M"),
        measure="gap of the loss",
        effect=lambda v: 1 - v["1/M"] / v["running"],
        meaning="share of the gap removed, rule 1/M (the rule is a derivation)",
        threshold=0.5,
    ),
    claim(
        name="evalnorm-accuracy",
        sentence="EvalNorm is more accurate than running averages when batches are of two.",
        published="ImageNet, batches of two: 6.18 points (abstract)",
        arms=("running", "1/M"),
        measure="error",
        effect=lambda v: v["running"] - v["1/M"],
        meaning="test error, running averages minus EvalNorm 1/M",
        threshold=0.0,
    ),
    claim(
        name="evalnorm-square",
        sentence="EvalNorm with the rule 1/M^2 is more accurate than running averages when batches are of two.",
        published="ImageNet, batches of two: 6.18 points (abstract; which rule is open)",
        arms=("running", "1/M^2"),
        measure="error",
        effect=lambda v: v["running"] - v["1/M^2"],
        meaning="test error, running averages minus EvalNorm 1/M^2",
        threshold=0.0,
    ),
)

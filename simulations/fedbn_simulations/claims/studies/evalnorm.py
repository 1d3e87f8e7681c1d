"""EvalNorm and example weighing: in evaluation, a sample contributes to its statistics as it did in training.

Singh, Shrivastava (2019) derive the weight of the sample from the training batch size; Summers, Dinneen (2020) select
it on held-out data. Networks are trained with batches of two, four and eight, and evaluated with running averages, with
the statistics of batches of the same size, and with each correction.
"""

from __future__ import annotations

import copy
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import CosineAnnealingLR

from fedbn.data.population import Examples
from fedbn.models.small_cnn import SmallCNN
from fedbn.nn.conversion import convert
from fedbn.nn.roles import norm_layers
from fedbn_simulations.claims.claim import Claim
from fedbn_simulations.claims.studies.common import DIGITS, accuracy, digits, seeded, shuffled, train

NUMERICS = 1

WEIGHTS = (0.0, 0.05, 0.1, 0.2, 0.3, 0.5)
"""Candidate weights of the example, selected on held-out data."""


def _trained(data: Examples, size: int, epochs: int, seed: int) -> nn.Module:
    with seeded(seed, "weights"):
        model: nn.Module = SmallCNN((1, 8, 8), 10)
    order = list(shuffled(len(data), size, epochs, seed))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0025 * size, momentum=0.9)
    return train(model, data, order, optimizer, scheduler=CosineAnnealingLR(optimizer, len(order)))


def with_best_weight(model: nn.Module, held_out: Examples) -> nn.Module:
    """``model`` with the example weight from `WEIGHTS` with the lowest loss on ``held_out`` (ties: the smallest)."""
    candidates = [convert(copy.deepcopy(model), "iew", w=w).eval() for w in WEIGHTS]
    with torch.no_grad():
        losses = [float(F.cross_entropy(candidate(held_out.x), held_out.y)) for candidate in candidates]
    return candidates[min(range(len(candidates)), key=losses.__getitem__)]


def _evaluate_batches(model: nn.Module, data: Examples, size: int, seed: int) -> tuple[float, float, dict[str, Tensor]]:
    """Loss, accuracy and normalized activations with batch statistics, as in training."""
    model = copy.deepcopy(model).train()
    loss, correct = 0.0, 0
    activations: dict[str, list[Tensor]] = {}
    with torch.no_grad():
        for rows in shuffled(len(data), size, 1, seed):
            out, outputs = _forward_with_activations(model, data.x[rows])
            loss += float(F.cross_entropy(out, data.y[rows], reduction="sum"))
            correct += int((out.argmax(1) == data.y[rows]).sum())
            activations = {k: [*activations.get(k, []), v] for k, v in outputs.items()}
    n = len(data) - len(data) % size
    return loss / n, correct / n, {k: torch.cat(v) for k, v in activations.items()}


def _forward_with_activations(model: nn.Module, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits, and outputs of the normalization layers ``[rows, C, *positions]`` by layer."""
    outputs: dict[str, Tensor] = {}

    def save_output(name: str) -> object:
        return lambda _module, _args, out: outputs.__setitem__(name, out)

    handles = [m.register_forward_hook(save_output(name)) for name, m in norm_layers(model).items()]  # type: ignore[arg-type]
    out = model(x)
    for handle in handles:
        handle.remove()
    return out, outputs


def distance(a: Tensor, b: Tensor) -> float:
    """Mean over channels of the 1-Wasserstein distance between values ``[n, C, *positions]``, with 100 quantiles.

    >>> distance(torch.zeros(2, 3, 4), torch.full((5, 3, 4), 0.5))
    0.5
    """
    q = torch.linspace(0.005, 0.995, 100)
    a, b = (torch.quantile(v.transpose(0, 1).flatten(1)[:, ::7], q, dim=1) for v in (a, b))
    return float((a - b).abs().mean())


def tiny_batches(arm: str, seed: int, quick: bool) -> dict[str, float]:
    """Test error, and differences of loss and normalized activations between training and evaluation on training data.

    The arm is the training batch size; names of the quantities include the evaluation rule.
    """
    size = int(arm)
    images, test = digits(seed)
    data, held_out = images.take(torch.arange(1100)), images.take(torch.arange(1100, 1347))
    model = _trained(data, size, 2 if quick else 5, seed)
    training_loss, _, activations = _evaluate_batches(model, data, size, seed)
    by_rule = {
        "running averages": model,
        "1/M": convert(copy.deepcopy(model), "evalnorm", rule="1/M", size=size),
        "1/M^2": convert(copy.deepcopy(model), "evalnorm", rule="1/M^2", size=size),
        "weighing": with_best_weight(model, held_out),
    }
    measured = {f"error: the batch itself {size}": 1 - _evaluate_batches(model, test, size, seed)[1]}
    for rule, evaluated in by_rule.items():
        with torch.no_grad():
            out, outputs = _forward_with_activations(evaluated.eval(), data.x)
        distances = [distance(outputs[k], activations[k]) for k in outputs]
        measured |= {
            f"error: {rule} {size}": 1 - accuracy(evaluated, test),
            f"gap of the loss: {rule} {size}": abs(float(F.cross_entropy(out, data.y)) - training_loss),
            f"distance: {rule} {size}": sum(distances) / len(distances),
        }
    return measured


RULES = ("running averages", "1/M", "1/M^2", "weighing", "the batch itself")
SINGH = "Singh, Shrivastava 2019, https://arxiv.org/abs/1904.06031"
claim = partial(
    Claim,
    source=SINGH,
    setting=f"{DIGITS}, 247 of the training images held out; small-cnn trained with batches of two",
    run=tiny_batches,
    arms=tuple(f"{rule} 2" for rule in RULES[:4]),
    effect=lambda v: 1 - v["1/M 2"] / v["running averages 2"],
    threshold=0.5,
    trained=lambda arm: arm.rpartition(" ")[2],
)
over_sizes = partial(
    claim,
    setting=f"{DIGITS}, 247 of the training images held out; small-cnn trained with batches of 2, 4 and 8",
    arms=tuple(f"{rule} {size}" for rule in RULES for size in (2, 4, 8)),
    drawing="curves",
    axis="training batch size",
    measure="error",
    threshold=0.0,
)
SIX_POINTS = "ImageNet, batches of two: 6.18 points (abstract)"

CLAIMS = (
    claim(
        name="evalnorm-gap",
        sentence="EvalNorm removes more than half of the difference in loss between training and evaluation.",
        published="no such number",
        measure="gap of the loss",
        meaning="fraction of the gap removed, rule 1/M (the rule is derived)",
    ),
    claim(
        name="evalnorm-distance",
        sentence="EvalNorm removes more than half of the distance between activations in training and evaluation.",
        published="shown in a figure without numbers",
        measure="distance",
        meaning="fraction of the Wasserstein distance between normalized activations removed, rule 1/M",
    ),
    over_sizes(
        name="evalnorm-accuracy",
        sentence="EvalNorm is more accurate than running averages for training batches of two.",
        published=SIX_POINTS,
        effect=lambda v: v["running averages 2"] - v["1/M 2"],
        meaning="test error, running averages minus EvalNorm 1/M",
    ),
    over_sizes(
        name="evalnorm-square",
        sentence="EvalNorm with the rule 1/M^2 is more accurate than running averages for training batches of two.",
        published=f"{SIX_POINTS}; the rule is not specified",
        effect=lambda v: v["running averages 2"] - v["1/M^2 2"],
        meaning="test error, running averages minus EvalNorm 1/M^2",
    ),
    over_sizes(
        name="evalnorm-own-batch",
        sentence="EvalNorm is more accurate than the statistics of a test batch of two.",
        source=f"follows from {SINGH}",
        published="no such number",
        effect=lambda v: v["the batch itself 2"] - v["1/M 2"],
        meaning="test error, batch statistics minus EvalNorm 1/M",
    ),
    over_sizes(
        name="weighing-accuracy",
        sentence="Example weighing, with a weight selected on held-out data, beats running averages.",
        source="Summers, Dinneen 2020, https://arxiv.org/abs/1906.03548",
        published="not verified",
        effect=lambda v: sum(v[f"running averages {s}"] - v[f"weighing {s}"] for s in (2, 4, 8)) / 3,
        meaning="test error, running averages minus example weighing, mean over batches of 2, 4 and 8",
    ),
)

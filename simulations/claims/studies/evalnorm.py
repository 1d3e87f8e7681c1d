"""EvalNorm and example weighing: in evaluation a sample counts in its statistics as it did in training.

Singh, Shrivastava (2019) derive by how much from the size of a training batch; Summers, Dinneen (2020) choose the
weight on held-out data. Networks trained with batches of two, four and eight; evaluated by running averages, by
batches of that size normalized by themselves, and by each correction.
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
from simulations.claims.claim import Claim
from simulations.claims.studies.common import DIGITS, accuracy, digits, seeded, shuffled, train

NUMERICS = 1
"""Version of this study's numbers; raise it when a change here changes results."""

WEIGHTS = (0.0, 0.05, 0.1, 0.2, 0.3, 0.5)
"""Of the example, from which held-out data choose."""


def _trained(data: Examples, size: int, epochs: int, seed: int) -> nn.Module:
    with seeded(seed, "weights"):
        model: nn.Module = SmallCNN((1, 8, 8), 10)
    order = list(shuffled(len(data), size, epochs, seed))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0025 * size, momentum=0.9)
    return train(model, data, order, optimizer, scheduler=CosineAnnealingLR(optimizer, len(order)))


def weighed(model: nn.Module, held_out: Examples) -> nn.Module:
    """``model`` with the example weight of `WEIGHTS` whose loss on ``held_out`` is lowest (or the smallest such)."""
    twins = [convert(copy.deepcopy(model), "iew", w=w).eval() for w in WEIGHTS]
    with torch.no_grad():
        losses = [float(F.cross_entropy(twin(held_out.x), held_out.y)) for twin in twins]
    return twins[min(range(len(twins)), key=losses.__getitem__)]


def _in_batches(model: nn.Module, data: Examples, size: int, seed: int) -> tuple[float, float, dict[str, Tensor]]:
    """Loss, share right and normalized activations where batches are normalized by themselves, as in training."""
    twin = copy.deepcopy(model).train()
    loss, right = 0.0, 0
    seen: dict[str, list[Tensor]] = {}
    with torch.no_grad():
        for rows in shuffled(len(data), size, 1, seed):
            out, found = _watched(twin, data.x[rows])
            loss += float(F.cross_entropy(out, data.y[rows], reduction="sum"))
            right += int((out.argmax(1) == data.y[rows]).sum())
            seen = {k: [*seen.get(k, []), v] for k, v in found.items()}
    n = len(data) - len(data) % size
    return loss / n, right / n, {k: torch.cat(v) for k, v in seen.items()}


def _watched(model: nn.Module, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits, and outputs of the normalization layers ``[rows, C, *positions]``, by layer."""
    found: dict[str, Tensor] = {}

    def keep(name: str) -> object:
        return lambda _module, _args, out: found.__setitem__(name, out)

    handles = [m.register_forward_hook(keep(name)) for name, m in norm_layers(model).items()]  # type: ignore[arg-type]
    out = model(x)
    for handle in handles:
        handle.remove()
    return out, found


def distance(one: Tensor, other: Tensor) -> float:
    """Mean over channels of the 1-Wasserstein distance between values ``[n, C, *positions]``, by 100 quantiles.

    >>> distance(torch.zeros(2, 3, 4), torch.full((5, 3, 4), 0.5))
    0.5
    """
    q = torch.linspace(0.005, 0.995, 100)
    a, b = (torch.quantile(v.transpose(0, 1).flatten(1)[:, ::7], q, dim=1) for v in (one, other))
    return float((a - b).abs().mean())


def tiny_batches(arm: str, seed: int, quick: bool) -> dict[str, float]:
    """Test error, and on training data how far losses and normalized activations are from those in training.

    The arm is the rows of a training batch; what evaluates is in the names.
    """
    size = int(arm)
    everything, test = digits(seed)
    data, held_out = everything.take(torch.arange(1100)), everything.take(torch.arange(1100, 1347))
    model = _trained(data, size, 2 if quick else 5, seed)
    in_training, _, activations = _in_batches(model, data, size, seed)
    by_rule = {
        "running averages": model,
        "1/M": convert(copy.deepcopy(model), "evalnorm", rule="1/M", size=size),
        "1/M^2": convert(copy.deepcopy(model), "evalnorm", rule="1/M^2", size=size),
        "weighing": weighed(model, held_out),
    }
    measured = {f"error: the batch itself {size}": 1 - _in_batches(model, test, size, seed)[1]}
    for rule, twin in by_rule.items():
        with torch.no_grad():
            out, found = _watched(twin.eval(), data.x)
        away = [distance(found[k], activations[k]) for k in found]
        measured |= {
            f"error: {rule} {size}": 1 - accuracy(twin, test),
            f"gap of the loss: {rule} {size}": abs(float(F.cross_entropy(out, data.y)) - in_training),
            f"distance: {rule} {size}": sum(away) / len(away),
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
    trained=lambda arm: arm.rpartition(" ")[2],
)
over_sizes = partial(
    claim,
    setting=f"{DIGITS}, 247 of the training images held out; small-cnn trained with batches of 2, 4 and 8",
    arms=tuple(f"{rule} {size}" for rule in RULES for size in (2, 4, 8)),
    drawing="curves",
    axis="rows of a training batch",
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
        effect=lambda v: 1 - v["1/M 2"] / v["running averages 2"],
        meaning="share of the gap removed, rule 1/M (the rule is a derivation)",
        threshold=0.5,
    ),
    claim(
        name="evalnorm-distance",
        sentence="EvalNorm removes more than half of the distance between activations in training and evaluation.",
        published="drawn in a figure, no number read",
        measure="distance",
        effect=lambda v: 1 - v["1/M 2"] / v["running averages 2"],
        meaning="share of the Wasserstein distance between normalized activations removed, rule 1/M",
        threshold=0.5,
    ),
    over_sizes(
        name="evalnorm-accuracy",
        sentence="EvalNorm is more accurate than running averages when batches are of two.",
        published=SIX_POINTS,
        effect=lambda v: v["running averages 2"] - v["1/M 2"],
        meaning="test error, running averages minus EvalNorm 1/M",
    ),
    over_sizes(
        name="evalnorm-square",
        sentence="EvalNorm with the rule 1/M^2 is more accurate than running averages when batches are of two.",
        published=f"{SIX_POINTS}; which rule is open",
        effect=lambda v: v["running averages 2"] - v["1/M^2 2"],
        meaning="test error, running averages minus EvalNorm 1/M^2",
    ),
    over_sizes(
        name="evalnorm-own-batch",
        sentence="A batch of two is better evaluated by EvalNorm than by its own statistics.",
        source=f"follows from {SINGH}",
        published="no such number",
        effect=lambda v: v["the batch itself 2"] - v["1/M 2"],
        meaning="test error, batches normalized by themselves minus EvalNorm 1/M",
    ),
    over_sizes(
        name="weighing-accuracy",
        sentence="Weighing the example at hand, by a weight chosen on held-out data, beats running averages.",
        source="Summers, Dinneen 2020, https://arxiv.org/abs/1906.03548",
        published="not verified",
        effect=lambda v: sum(v[f"running averages {s}"] - v[f"weighing {s}"] for s in (2, 4, 8)) / 3,
        meaning="test error, running averages minus example weighing, mean over batches of 2, 4 and 8",
    ),
)

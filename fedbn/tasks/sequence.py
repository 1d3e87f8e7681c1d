"""Sequence labels: one class per step of a sequence, trained with cross-entropy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from torch import Tensor
from torch.nn import functional as F

from fedbn.data.labels import encode_indices
from fedbn.errors import UserError
from fedbn.tasks.base import describe_targets
from fedbn.tasks.metrics import count_classes, mean_f1
from fedbn.tasks.vectorized import VectorizedTask

IGNORED = -100
"""Target of positions that do not count, such as padding; the default of ``torch.nn.functional.cross_entropy``."""


def class_counts(outputs: Tensor, y: Tensor, valid: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Numbers of hits, labels and predictions of each class over a user's positions that count, and of these positions.

    Args:
        outputs: logits ``[K, B, classes, *positions]``.
        y: targets ``[K, B, *positions]``.
        valid: which examples are not padding, ``[K, B]``.
    """
    classes, counts = outputs.shape[2], (y != IGNORED) & valid.view(*valid.shape, *[1] * (y.dim() - 2))
    predicted = outputs.argmax(2)
    hits, labels, guessed = (
        count_classes(values, where, classes)
        for values, where in ((y, counts & (predicted == y)), (y, counts), (predicted, counts))
    )
    return hits, labels, guessed, labels.sum(1)


@dataclass(frozen=True)
class PositionTask(VectorizedTask):
    """Base class of tasks with one class per position.

    Attributes:
        weights: weight of each class in the cross-entropy; empty for equal weights.
    """

    example_metric: ClassVar[str] = "accuracy"

    weights: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if any(not w > 0 for w in self.weights):
            raise UserError(f"{self.name}: weights must be positive, not {'+'.join(map(str, self.weights))}")

    def output_shape(self, y: Tensor, classes: Sequence[str]) -> tuple[int, ...]:
        return (len(classes), *y.shape[1:])

    def losses(self, outputs: Tensor, y: Tensor) -> Tensor:
        """Mean cross-entropy over the positions that count; 0 if an example has none."""
        weights = outputs.new_tensor(self.weights) if self.weights else None
        losses = F.cross_entropy(outputs, y, weights, reduction="none", ignore_index=IGNORED).flatten(1)
        return losses.sum(1) / (y != IGNORED).flatten(1).sum(1).clamp_min(1)

    def predict(self, outputs: Tensor) -> Tensor:
        return outputs.softmax(1)

    def example_values(self, outputs: Tensor, y: Tensor) -> Tensor:
        """Share of correct positions among those that count; NaN if an example has none."""
        valid = (y != IGNORED).flatten(1)
        return ((outputs.argmax(1) == y).flatten(1) & valid).sum(1).double() / valid.sum(1)

    def check_indices(self, y: Tensor, classes: Sequence[str]) -> str | None:
        """What is wrong with class indices."""
        count, wrong = len(classes), ((y < 0) | (y >= len(classes))) & (y != IGNORED)
        if wrong.any():
            return f"a target is {int(y[wrong][0])}, but there are {count} classes, 0 to {count - 1} (or {IGNORED})"
        if self.weights and len(self.weights) != count:
            return f"{self.name} has {len(self.weights)} weights for {count} classes"
        return None

    def encode(self, values: np.ndarray, name: str, classes: tuple[str, ...]) -> tuple[np.ndarray, tuple[str, ...]]:
        return encode_indices(values, name, classes, IGNORED)


@dataclass(frozen=True)
class SequenceLabels(PositionTask):
    """One class per step: outputs are logits ``[n, classes, steps]``, targets ``[n, steps]``.

    Targets are class indices, and -100 for steps that do not count, such as the padding of shorter sequences. The loss
    of an example is the mean over its steps. Metrics are computed from all steps of a user.

    Attributes:
        weights: weight of each class in the cross-entropy, e.g. ``1+5``; empty for equal weights.

    >>> import torch
    >>> outputs, y = torch.tensor([[[9.0, -9.0, 9.0], [-9.0, 9.0, -9.0]]]), torch.tensor([[0, 0, -100]])
    >>> SequenceLabels().scores(outputs, y)["accuracy"]
    0.5
    """

    name: ClassVar[str] = "sequence"
    about: ClassVar[str] = "one class per step of a sequence, cross-entropy"
    metrics_are_shares: ClassVar[bool] = True
    metrics: ClassVar[dict[str, bool]] = {"accuracy": True, "macro_f1": True}

    def user_scores(self, outputs: Tensor, y: Tensor, valid: Tensor, *, final: bool) -> dict[str, Tensor]:
        hits, labels, predicted, total = class_counts(outputs, y, valid)
        return {"accuracy": hits.sum(1).double() / total, "macro_f1": mean_f1(hits, labels + predicted)}

    def check(self, y: Tensor, classes: Sequence[str]) -> str | None:
        if y.dim() != 2 or y.is_floating_point():
            return f"sequence needs a row of class indices per example, not {describe_targets(y)}"
        return self.check_indices(y, classes)

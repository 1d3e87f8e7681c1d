"""Multi-label classification: each label is present or absent, trained with binary cross-entropy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from fedbn.data.labels import encode_numbers
from fedbn.data.population import Population
from fedbn.errors import UserError
from fedbn.tasks.base import describe_targets
from fedbn.tasks.metrics import mean_f1, mean_over, ranking
from fedbn.tasks.vectorized import VectorizedTask


@dataclass(frozen=True)
class MultiLabel(VectorizedTask):
    r"""Several labels per example: outputs are logits ``[n, labels]``, targets 0 or 1, ``[n, labels]`` float32.

    The loss of an example is the mean over labels of the binary cross-entropy. A label counts as predicted if its
    probability is at least one half. ``accuracy`` is the share of correct entries, ``exact_match`` the share of
    examples with all entries correct. F1, area under the ROC curve and average precision are means over labels.

    Attributes:
        weights: weight of the positives of each label, e.g. ``1+4+2``; empty for equal weights.
        balanced: whether the weights are the ratio of negatives to positives in the training rows of seen users.

    >>> MultiLabel().scores(torch.tensor([[2.0, -2.0], [2.0, 2.0]]), torch.tensor([[1.0, 0.0], [1.0, 0.0]]))["accuracy"]
    0.75
    """

    name: ClassVar[str] = "multilabel"
    about: ClassVar[str] = "several labels per example, binary cross-entropy"
    metrics_are_shares: ClassVar[bool] = True
    example_metric: ClassVar[str] = "accuracy"
    metrics: ClassVar[dict[str, bool]] = {
        "macro_f1": True,
        "accuracy": True,
        "exact_match": True,
        "auroc": True,
        "average_precision": True,
    }

    weights: tuple[float, ...] = ()
    balanced: bool = False

    def __post_init__(self) -> None:
        if any(not w > 0 for w in self.weights):
            raise UserError(f"multilabel: weights must be positive, not {'+'.join(map(str, self.weights))}")

    def output_shape(self, y: Tensor, classes: Sequence[str]) -> tuple[int, ...]:
        return (y.shape[1],)

    def losses(self, outputs: Tensor, y: Tensor) -> Tensor:
        weights = outputs.new_tensor(self.weights) if self.weights else None
        target = y.to(outputs.dtype)
        return F.binary_cross_entropy_with_logits(outputs, target, pos_weight=weights, reduction="none").mean(1)

    def user_scores(self, outputs: Tensor, y: Tensor, valid: Tensor, *, final: bool) -> dict[str, Tensor]:
        rows, n = valid[..., None], valid.sum(1)
        predicted, positive = (outputs >= 0) & rows, (y > 0.5) & rows
        correct = (predicted == positive) & rows
        hits = (predicted & positive).sum(1)
        values = {
            "macro_f1": mean_f1(hits, predicted.sum(1) + positive.sum(1)),
            "accuracy": correct.sum((1, 2)).double() / (n * y.shape[2]),
            "exact_match": correct.all(2).sum(1).double() / n,
        }
        if final:
            area, precision = ranking(outputs.mT, positive.mT, valid[:, None])
            values["auroc"] = mean_over(area, ~area.isnan())
            values["average_precision"] = mean_over(precision, ~precision.isnan())
        return values

    def predict(self, outputs: Tensor) -> Tensor:
        return outputs.sigmoid()

    def example_values(self, outputs: Tensor, y: Tensor) -> Tensor:
        return ((outputs >= 0) == (y > 0.5)).double().mean(1)

    def check(self, y: Tensor, classes: Sequence[str]) -> str | None:
        if y.dim() != 2 or y.shape[1] < 2:
            return f"multilabel needs a column of 0 or 1 per label, not {describe_targets(y)}"
        if ((y != 0) & (y != 1)).any():
            return "multilabel needs targets of 0 or 1, but there are other values"
        if self.weights and len(self.weights) != y.shape[1]:
            return f"multilabel has {len(self.weights)} weights for {y.shape[1]} labels"
        return None

    def notices(self, population: Population) -> list[str]:
        present = torch.stack([population.users[i].train.y.cpu().amax(0) for i in population.seen]).amax(0)
        missing = (present == 0).nonzero().flatten().tolist()
        names = population.classes or tuple(map(str, range(len(present))))
        listed = ", ".join(names[i] for i in missing)
        return [f"no seen user has training data with label {listed}, so it is never predicted"] if missing else []

    def fit(self, y: Tensor, classes: Sequence[str]) -> MultiLabel:
        if not self.balanced:
            return self
        positives = y.double().sum(0)
        return replace(self, weights=tuple(((len(y) - positives).clamp_min(1) / positives.clamp_min(1)).tolist()))

    def encode(self, values: np.ndarray, name: str, classes: tuple[str, ...]) -> tuple[np.ndarray, tuple[str, ...]]:
        numbers = encode_numbers(values, name)
        return numbers, classes or tuple(map(str, range(numbers.shape[1] if numbers.ndim > 1 else 0)))

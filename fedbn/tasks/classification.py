"""Classification: one class per example, trained with cross-entropy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from fedbn.data.labels import encode_labels
from fedbn.data.population import Population
from fedbn.errors import UserError
from fedbn.tasks.base import describe_targets
from fedbn.tasks.metrics import calibration_error, count_classes, mean_f1, mean_over, ranking
from fedbn.tasks.vectorized import VectorizedTask


@dataclass(frozen=True)
class Classification(VectorizedTask):
    r"""One class per example: outputs are logits ``[n, classes]``, targets class indices ``[n]``.

    The loss of an example of class :math:`c` is :math:`w_c` times its cross-entropy, and a batch's loss is the mean
    over examples, so that it does not depend on the classes of the other examples.

    Attributes:
        smoothing: share of the target that is spread over all classes (label smoothing), in [0, 1).
        weights: weight :math:`w_c` of each class, e.g. ``1+2+0.5``; empty for equal weights.
        balanced: whether the weights are inversely proportional to the number of training rows of seen users, with
            mean 1 over these rows.

    >>> task = Classification()
    >>> task.losses(torch.tensor([[0.0, 0.0]]), torch.tensor([1]))
    tensor([0.6931])
    >>> Classification(balanced=True).fit(torch.tensor([0, 0, 0, 1]), ("a", "b")).weights
    (0.6666666666666666, 2.0)
    """

    name: ClassVar[str] = "classification"
    about: ClassVar[str] = "one class per example, cross-entropy"
    metrics_are_shares: ClassVar[bool] = True
    example_metric: ClassVar[str] = "accuracy"
    metrics: ClassVar[dict[str, bool]] = {
        "accuracy": True,
        "macro_f1": True,
        "balanced_accuracy": True,
        "auroc": True,
        "average_precision": True,
        "ece": False,
    }

    smoothing: float = 0.0
    weights: tuple[float, ...] = ()
    balanced: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.smoothing < 1:
            raise UserError(f"classification: smoothing must be at least 0 and below 1, not {self.smoothing}")
        if any(not w > 0 for w in self.weights):
            raise UserError(f"classification: weights must be positive, not {'+'.join(map(str, self.weights))}")

    @property
    def is_cross_entropy(self) -> bool:
        return not (self.smoothing or self.weights or self.balanced)

    def output_shape(self, y: Tensor, classes: Sequence[str]) -> tuple[int, ...]:
        return (len(classes),)

    def losses(self, outputs: Tensor, y: Tensor) -> Tensor:
        weights = outputs.new_tensor(self.weights) if self.weights else None
        return F.cross_entropy(outputs, y, weights, reduction="none", label_smoothing=self.smoothing)

    def loss(self, outputs: Tensor, y: Tensor) -> Tensor:
        if self.weights:
            return super().loss(outputs, y)
        return F.cross_entropy(outputs, y, label_smoothing=self.smoothing)

    def stacked_losses(self, outputs: Tensor, y: Tensor) -> Tensor:
        # A softmax over the short innermost axis would be several times slower, so classes are on an outer axis.
        return self.losses(outputs, y)

    def stacked_gradients(self, outputs: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        if type(self) is not Classification or not self.is_cross_entropy:
            return super().stacked_gradients(outputs, y)
        log_p, classes = outputs.log_softmax(1), y.unsqueeze(1)
        losses = log_p.gather(1, classes).neg_().squeeze(1)
        return losses, log_p.exp_().scatter_(1, classes, -1.0, reduce="add")

    def example_values(self, outputs: Tensor, y: Tensor) -> Tensor:
        return (outputs.argmax(1) == y).double()

    def user_scores(self, outputs: Tensor, y: Tensor, valid: Tensor, *, final: bool) -> dict[str, Tensor]:
        classes = outputs.shape[2]
        predicted = outputs.argmax(2)
        correct = (predicted == y) & valid
        guessed = count_classes(predicted, valid, classes)
        misses, hits = count_classes(2 * y + correct, valid, 2 * classes).unflatten(1, (-1, 2)).unbind(2)
        labels = hits + misses
        values = {"accuracy": correct.sum(1).double() / valid.sum(1), "macro_f1": mean_f1(hits, labels + guessed)}
        if final:
            values["balanced_accuracy"] = mean_over(hits.double() / labels.clamp_min(1), labels > 0)
            p = outputs.double().mT.contiguous().softmax(1)  # several times faster than over the short innermost axis
            one_hot = y[:, None] == torch.arange(classes, device=y.device)[:, None]
            # In float32, so that equal examples have equal probabilities in every engine in a run in float64.
            area, precision = ranking(p.float(), one_hot, valid[:, None])
            values["auroc"] = mean_over(area, ~area.isnan())
            values["average_precision"] = mean_over(precision, ~precision.isnan())
            values["ece"] = calibration_error(p.amax(1), correct, valid)
        return values

    def predict(self, outputs: Tensor) -> Tensor:
        return outputs.softmax(1)

    def posterior(self, outputs: Tensor) -> Tensor | None:
        return outputs.softmax(1)

    def check(self, y: Tensor, classes: Sequence[str]) -> str | None:
        if y.dim() != 1 or y.is_floating_point():
            return f"classification needs one class index per row, not {describe_targets(y)}"
        low, high, count = int(y.min()), int(y.max()), len(classes)
        if low < 0 or high >= count:
            return f"labels run from {low} to {high}, but there are {count} classes, 0 to {count - 1}"
        if self.weights and len(self.weights) != count:
            return f"classification has {len(self.weights)} weights for {count} classes"
        return None

    def notices(self, population: Population) -> list[str]:
        trained = torch.zeros(len(population.classes), dtype=torch.bool)
        for i in population.seen:
            trained[population.users[i].train.y.cpu()] = True
        if trained.all():
            return []
        missing = ", ".join(population.classes[i] for i in (~trained).nonzero().flatten().tolist())
        message = (
            f"no seen user has training data of class {missing}, so it is never predicted: hold out fewer users, use "
            "another seed or partition, bring more rows of the class (shorter windows), or drop it"
        )
        if int(trained.sum()) < 2:
            raise UserError(message)
        return [message]

    def fit(self, y: Tensor, classes: Sequence[str]) -> Classification:
        if not self.balanced:
            return self
        counts = torch.bincount(y, minlength=len(classes)).double()
        present = int((counts > 0).sum())
        return replace(self, weights=tuple((len(y) / (present * counts.clamp_min(1))).tolist()))

    def encode(self, values: np.ndarray, name: str, classes: tuple[str, ...]) -> tuple[np.ndarray, tuple[str, ...]]:
        return encode_labels(values, name, classes)

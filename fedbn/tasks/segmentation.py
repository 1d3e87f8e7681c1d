"""Segmentation: one class per position, trained with cross-entropy or the Dice loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fedbn.errors import UserError
from fedbn.tasks.base import describe_targets
from fedbn.tasks.metrics import mean_over
from fedbn.tasks.sequence import IGNORED, PositionTask, class_counts


@dataclass(frozen=True)
class Segmentation(PositionTask):
    r"""One class per position: outputs are logits ``[n, classes, *positions]``, targets ``[n, *positions]``.

    Targets are class indices, and -100 for positions that do not count. The Dice loss of an example is one minus the
    mean over classes of :math:`\frac{2\sum_i p_{ci}g_{ci}+1}{\sum_i p_{ci}+\sum_i g_{ci}+1}` with the probabilities
    :math:`p` and the indicators :math:`g` of the targets. Dice and IoU as metrics are computed from all positions of a
    user and averaged over the classes that occur or are predicted.

    Milletari, Navab, Ahmadi, 2016 (V-Net), https://arxiv.org/abs/1606.04797

    Attributes:
        loss_: ``ce`` (cross-entropy), ``dice``, or ``both`` (their sum).
        background: whether class 0 counts in the Dice loss, Dice and IoU.
        weights: weight of each class in the cross-entropy, e.g. ``1+5``; empty for equal weights.

    >>> outputs, y = torch.tensor([[[[9.0, -9.0]], [[-9.0, 9.0]]]]), torch.tensor([[[0, 0]]])
    >>> found = Segmentation().scores(outputs, y)
    >>> round(found["dice"], 3), found["iou"], found["accuracy"]
    (0.333, 0.25, 0.5)
    """

    name: ClassVar[str] = "segmentation"
    about: ClassVar[str] = "one class per pixel, cross-entropy or Dice loss"
    metrics_are_shares: ClassVar[bool] = True
    metrics: ClassVar[dict[str, bool]] = {"dice": True, "iou": True, "accuracy": True}

    loss_: Literal["ce", "dice", "both"] = "ce"
    background: bool = True

    def losses(self, outputs: Tensor, y: Tensor) -> Tensor:
        if self.loss_ == "dice":
            return self._dice_losses(outputs, y)
        loss = super().losses(outputs, y)
        return loss if self.loss_ == "ce" else loss + self._dice_losses(outputs, y)

    def _dice_losses(self, outputs: Tensor, y: Tensor) -> Tensor:
        valid = (y != IGNORED)[:, None]
        p = torch.where(valid, outputs.softmax(1), 0).flatten(2)
        classes = torch.arange(outputs.shape[1], device=y.device).view(-1, *[1] * (y.dim() - 1))
        g = (y[:, None] == classes).to(p.dtype).flatten(2)
        dice = (2 * (p * g).sum(2) + 1) / (p.sum(2) + g.sum(2) + 1)
        return 1 - dice[:, 0 if self.background else 1 :].mean(1)

    def user_scores(self, outputs: Tensor, y: Tensor, valid: Tensor, *, final: bool) -> dict[str, Tensor]:
        hits, labels, predicted, total = class_counts(outputs, y, valid)
        first = 0 if self.background else 1
        a, b = hits[:, first:].double(), (labels + predicted)[:, first:]
        return {
            "dice": mean_over(2 * a / b.clamp_min(1), b > 0),
            "iou": mean_over(a / (b - a).clamp_min(1), b > 0),
            "accuracy": hits.sum(1).double() / total,
        }

    def check(self, y: Tensor, classes: Sequence[str]) -> str | None:
        if y.dim() < 3 or y.is_floating_point():
            return f"segmentation needs a map of class indices per row, not {describe_targets(y)}"
        if not self.background and len(classes) < 2:
            raise UserError("segmentation: background=false needs at least two classes")
        return self.check_indices(y, classes)

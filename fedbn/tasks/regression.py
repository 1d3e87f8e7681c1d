"""Regression: one or several real numbers per example."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from fedbn.errors import UserError
from fedbn.tasks.base import describe_targets
from fedbn.tasks.vectorized import VectorizedTask


@dataclass(frozen=True)
class Regression(VectorizedTask):
    r"""Real numbers per example: outputs ``[n, d]``, targets ``[n]`` or ``[n, d]`` float32.

    The model predicts standardized targets, :math:`(y-\mathrm{center})/\mathrm{scale}`, so that learning rates do not
    depend on units; the loss is in standard deviations. Metrics are in the units of the targets. The loss of an example
    is the mean over its d targets.

    Attributes:
        loss_: ``mse``, ``mae``, or ``huber`` (Huber 1964: quadratic up to ``delta``, then linear).
        delta: limit of the quadratic part, in standard deviations.
        center: value of each target that corresponds to an output of 0, e.g. ``40`` or ``40+1.7``; empty for the mean
            over the training rows of all seen users.
        scale: value of each target that corresponds to an output of 1; empty for the standard deviation over them.

    >>> task = Regression().fit(torch.tensor([1.0, 3.0]), ())
    >>> task.center, task.scale
    ((2.0,), (1.0,))
    >>> task.scores(torch.tensor([[1.0], [2.0]]), torch.tensor([3.0, 3.0]))["mae"]
    0.5
    """

    name: ClassVar[str] = "regression"
    about: ClassVar[str] = "real numbers, squared, absolute or Huber error"
    example_metric: ClassVar[str] = "mae"
    metrics: ClassVar[dict[str, bool]] = {"rmse": False, "mae": False, "r2": True}

    loss_: Literal["mse", "mae", "huber"] = "mse"
    delta: float = 1.0
    center: tuple[float, ...] = ()
    scale: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if not self.delta > 0:
            raise UserError(f"regression: delta must be positive, not {self.delta}")
        if any(not s > 0 for s in self.scale):
            raise UserError(f"regression: scale must be positive, not {'+'.join(map(str, self.scale))}")

    def output_shape(self, y: Tensor, classes: Sequence[str]) -> tuple[int, ...]:
        return (1 if y.dim() == 1 else y.shape[1],)

    def losses(self, outputs: Tensor, y: Tensor) -> Tensor:
        center, scale = (outputs.new_tensor(v) for v in (self.center or (0.0,), self.scale or (1.0,)))
        target = (y.view(outputs.shape).to(outputs.dtype) - center) / scale
        if self.loss_ == "mae":
            return F.l1_loss(outputs, target, reduction="none").mean(1)
        if self.loss_ == "huber":
            return F.huber_loss(outputs, target, reduction="none", delta=self.delta).mean(1)
        return F.mse_loss(outputs, target, reduction="none").mean(1)

    def user_scores(self, outputs: Tensor, y: Tensor, valid: Tensor, *, final: bool) -> dict[str, Tensor]:
        rows, n = valid[..., None], valid.sum(1, keepdim=True)
        y = y.view(outputs.shape).double()
        error = torch.where(rows, self.predict(outputs) - y, 0)
        mean = torch.where(rows, y, 0).sum(1) / n
        residual, total = (error**2).sum(1), torch.where(rows, (y - mean[:, None]) ** 2, 0).sum(1)
        return {
            "rmse": (residual.sum(1) / (n[:, 0] * y.shape[2])).sqrt(),
            "mae": error.abs().sum((1, 2)) / (n[:, 0] * y.shape[2]),
            "r2": torch.where(total > 0, 1 - residual / total, torch.nan).mean(1),
        }

    def example_values(self, outputs: Tensor, y: Tensor) -> Tensor:
        return (self.predict(outputs) - y.view(outputs.shape).double()).abs().mean(1)

    def predict(self, outputs: Tensor) -> Tensor:
        """Predictions ``[n, d]`` in the units of the targets, in double precision."""
        center, scale = (outputs.new_tensor(v).double() for v in (self.center or (0.0,), self.scale or (1.0,)))
        return outputs.double() * scale + center

    def check(self, y: Tensor, classes: Sequence[str]) -> str | None:
        if y.dim() > 2 or not y.is_floating_point():
            return f"regression needs real numbers, not {describe_targets(y)}"
        if not y.isfinite().all():
            return f"{int((~y.isfinite()).sum())} targets are NaN or infinite"
        width = self.output_shape(y, classes)[0]
        for option, values in (("center", self.center), ("scale", self.scale)):
            if values and len(values) != width:
                return f"regression has {len(values)} values of {option} for {width} targets"
        return None

    def fit(self, y: Tensor, classes: Sequence[str]) -> Regression:
        y = y.double().flatten(1) if y.dim() > 1 else y.double()[:, None]
        deviation = y.std(0, correction=0)
        return replace(
            self,
            center=self.center or tuple(y.mean(0).tolist()),
            scale=self.scale or tuple(torch.where(deviation > 0, deviation, 1).tolist()),
        )

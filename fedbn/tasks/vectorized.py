"""Base class of tasks whose metrics are computed for many users at once."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedbn.tasks.base import Task

LOSS_NUMBERS = 2**18
"""Numbers of outputs in double precision per computation of losses, which fit into the cache."""


@dataclass(frozen=True)
class VectorizedTask(Task):
    """A task whose metrics are tensors with one value per user."""

    @abstractmethod
    def user_scores(self, outputs: Tensor, y: Tensor, valid: Tensor, *, final: bool) -> dict[str, Tensor]:
        """Values ``[K]`` of the metrics of K users; NaN where undefined.

        Args:
            outputs: ``[K, B, *output_shape]``.
            y: targets ``[K, B, ...]``.
            valid: which examples are not padding, ``[K, B]``.
            final: whether to compute all metrics; otherwise, only those of `Task.curve_scores`.
        """

    def scores(self, outputs: Tensor, y: Tensor) -> dict[str, float]:
        return self._single_scores(outputs, y, final=True)

    def curve_scores(self, outputs: Tensor, y: Tensor) -> dict[str, float]:
        return self._single_scores(outputs, y, final=False) if self._has_own_scores else self.scores(outputs, y)

    def evaluate_users(
        self, outputs: Tensor, y: Tensor, n: Sequence[int], *, final: bool = True
    ) -> list[dict[str, float]]:
        if not self._has_own_scores:
            return super().evaluate_users(outputs, y, n, final=final)
        sizes = torch.tensor(n, device=y.device)
        valid = torch.arange(y.shape[1], device=y.device) < sizes[:, None]
        users = max(1, LOSS_NUMBERS // outputs[0].numel())
        parts = zip(outputs.split(users), y.split(users), strict=True)
        losses = torch.cat([self.stacked_losses(part.double().transpose(1, 2), targets) for part, targets in parts])
        mean = torch.where(valid, losses, 0).sum(1) / sizes
        rows = _rows(self.user_scores(outputs, y, valid, final=final))
        if final and self.extra_metrics:
            rows = [row | self.extra_scores(outputs[i, : n[i]], y[i, : n[i]]) for i, row in enumerate(rows)]
        return [row | {"loss": loss} for row, loss in zip(rows, mean.tolist(), strict=True)]

    @property
    def _has_own_scores(self) -> bool:
        """Whether no subclass replaces `scores` by a function for one user."""
        return type(self).scores is VectorizedTask.scores

    def _single_scores(self, outputs: Tensor, y: Tensor, *, final: bool) -> dict[str, float]:
        valid = torch.ones(1, len(y), dtype=torch.bool, device=y.device)
        return _rows(self.user_scores(outputs[None], y[None], valid, final=final))[0]


def _rows(values: dict[str, Tensor]) -> list[dict[str, float]]:
    """The values of each user, without NaN."""
    rows = zip(*(value.tolist() for value in values.values()), strict=True)
    return [{name: v for name, v in zip(values, row, strict=True) if v == v} for row in rows]

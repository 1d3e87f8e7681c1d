"""Exact moments of all windows so far, without the source."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fedbn.online.rules.base import Rule
from fedbn.online.statistics import State


@dataclass(frozen=True)
class Cumulative(Rule):
    r"""Plain moments: :math:`a_t = 1/n_t`; the first window replaces the source.

    Like `torch.nn.BatchNorm2d` with ``momentum=None``, but averages windows instead of batches and includes the
    variance between them.
    """

    name = "cumulative"
    about = "moments of all windows so far, without the source"
    source = "Chan, Golub, LeVeque 1979, http://i.stanford.edu/pub/cstr/reports/cs/tr/79/773/CS-TR-79-773.pdf"

    def gain(self, state: State, weight: Tensor) -> Tensor:
        return weight / (state.n[:, 0] + weight)

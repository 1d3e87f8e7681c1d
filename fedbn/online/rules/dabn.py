r"""Online domain-adaptive BN for activity recognition."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fedbn.online.rules.base import Rule
from fedbn.online.statistics import State


@dataclass(frozen=True)
class DABN(Rule):
    r"""Exactly exponentially weighted moments, updated before they are used:

    .. math:: V \leftarrow (1-a)\,(V + a (x-M)^2),\qquad M \leftarrow (1-a) M + a x .

    Mazankiewicz, Böhm, Bergés, 2020, *Incremental real-time personalization in human activity recognition using domain
    adaptive batch normalization*, https://arxiv.org/abs/2005.12178

    A window with positions brings its own variance too; for layers without positions it is the recursion above. The
    paper trains with batches of one user each, and starts a new user at the mean over users of their statistics. So
    does the strategy ``centralized`` with ``user_batches``; in federation every batch is of one user, and
    ``global-naive`` with uniform weights gives that start.

    Attributes:
        rate: a.
    """

    name = "dabn"
    about = "exponentially weighted moments, updated before use (DA-BN)"
    source = "Mazankiewicz, Böhm, Bergés 2020, arXiv:2005.12178"
    includes_current = True

    rate: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        self.within("rate", 0, 1)

    def gain(self, state: State, weight: Tensor) -> Tensor:
        return self.rate * weight.clamp(max=1)

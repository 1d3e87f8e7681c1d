r"""DA-BN: online domain-adaptive BN for activity recognition."""

from __future__ import annotations

from dataclasses import dataclass

from fedbn.online.rules.base import RunningAverage


@dataclass(frozen=True)
class DABN(RunningAverage):
    r"""Exact exponentially weighted moments, updated before use:

    .. math:: V \leftarrow (1-a)\,(V + a (x-M)^2),\qquad M \leftarrow (1-a) M + a x .

    Mazankiewicz, Böhm, Bergés, 2020, *Incremental real-time personalization in human activity recognition using domain
    adaptive batch normalization*, https://arxiv.org/abs/2005.12178

    A window with several positions also contributes its own variance; for layers without positions, this is the
    recursion above. The paper trains with batches of one user each, and a new user starts from the mean of the users'
    statistics. The strategy ``centralized`` with ``user_batches`` does the same. In federation every batch belongs to
    one user, and ``global-naive`` with uniform weights gives the same start.

    Attributes:
        rate: a.
    """

    name = "dabn"
    about = "exponentially weighted moments, updated before use (DA-BN)"
    source = "Mazankiewicz, Böhm, Bergés 2020, arXiv:2005.12178"
    includes_current = True

"""Global BN with statistics that are robust to a minority of poisoning clients."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from fedbn.errors import UserError
from fedbn.nn.roles import State
from fedbn.statistics.robust import location, robust_moments
from fedbn.strategies.base import NormStrategy, Progress, Updates


@dataclass(frozen=True)
class GlobalRobust(NormStrategy):
    r"""Share all entries; pool statistics by a trimmed mean or median of moments, with equal client weights.

    Parameters are averaged as usual. Only the statistics are protected, through which a single client can disable a
    network. After Yin, Chen, Ramchandran, Bartlett, 2018, https://arxiv.org/abs/1803.01498

    Of :math:`n` clients in a round, the trimmed mean withstands :math:`\lfloor n\cdot\mathrm{trim}\rfloor` arbitrary
    ones, the median :math:`\lfloor (n-1)/2\rfloor` (breakdown points of ``trim`` and nearly one half). With fewer than
    1/``trim`` clients, nothing is trimmed and the trimmed mean is a plain mean; a notice says so.

    Attributes:
        how: ``trimmed`` or ``median``.
        trim: share of the clients that is removed at either end, per channel.

    >>> GlobalRobust().withstands(4), GlobalRobust().withstands(5), GlobalRobust(how="median").withstands(5)
    (0, 1, 2)
    >>> import torch; from fedbn.strategies.base import Update
    >>> def client(i, var): return Update(
    ...     i, {"bn.running_mean": torch.zeros(1), "bn.running_var": torch.tensor([var])}, 1, 0.0)
    >>> names = ["bn.running_mean", "bn.running_var"]
    >>> updates = [client(0, 1.0), client(1, 2.0), client(2, 1e9)]
    >>> GlobalRobust(how="median").aggregate_statistics(updates, [1] * 3, names, {}, None)
    {'bn.running_mean': tensor([0.]), 'bn.running_var': tensor([2.])}
    """

    name = "global-robust"
    title = "FedAvg (robust BN)"
    about = "one BN for all; trimmed mean or median of statistics; options how, trim"
    source = "after Yin et al. 2018"
    how: Literal["trimmed", "median"] = "trimmed"
    trim: float = 0.2

    def __post_init__(self) -> None:
        if not 0 <= self.trim < 0.5:
            raise UserError(f"global-robust: trim must lie in [0, 0.5), not {self.trim}")

    def withstands(self, clients: int) -> int:
        """Number of arbitrary clients among ``clients`` that cannot change the statistics at will."""
        return int(self.trim * clients) if self.how == "trimmed" else (clients - 1) // 2

    def notices(self, clients: int) -> list[str]:
        if self.withstands(clients):
            return []
        least = math.ceil(1 / self.trim) if self.how == "trimmed" and self.trim else 3
        return [
            f"global-robust protects nothing with {clients} clients in a round, of which it cuts off none: use "
            f"{'how=median, or ' if least > 3 else 'how=median and '}at least {least} clients"
        ]

    def aggregate_statistics(
        self, updates: Updates, weights: Sequence[float], keys: Sequence[str], old: State, progress: Progress
    ) -> State:
        states = [u.state for u in updates]
        out = {}
        for key in keys:
            values = [s[key] for s in states]
            mean = key.removesuffix("running_var") + "running_mean"
            if key.endswith("running_var") and mean in keys:
                value = robust_moments([s[mean] for s in states], values, self.how, self.trim)[1]
            else:
                value = location(values, self.how, self.trim)
            out[key] = value.to(values[0].device, values[0].dtype)
        return out

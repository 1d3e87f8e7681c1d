"""Global BN with FedAvg on the whole state dict: running variances are averaged like weights."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from fedbn.strategies.base import NormStrategy


@dataclass(frozen=True)
class GlobalNaive(NormStrategy):
    r"""Share all entries; :math:`\sigma^2 \leftarrow \sum_k w_k \sigma_k^2`, without the variance of the means.

    For a network without running statistics this is plain FedAvg.
    McMahan, Moore, Ramage, Hampson, Agüera y Arcas, 2017, https://arxiv.org/abs/1602.05629

    >>> import torch; from fedbn.strategies.base import Progress, Update
    >>> clients = [Update(i, {"v": torch.ones(1)}, 1, 0.0) for i in (0, 1)]
    >>> GlobalNaive().aggregate_statistics(clients, [1, 1], ["v"], {}, Progress(1, 1))
    {'v': tensor([1.])}
    """

    name = "global-naive"
    title = "FedAvg (naive BN)"
    aliases = ("fedavg", "bn")
    about = "one BN for all; averaged like weights (plain FedAvg)"
    source = "McMahan et al. 2017"

    def prepare_model(self, model: nn.Module) -> nn.Module:
        return model

"""FedAP: parameters weighted by the distance of clients' BN statistics (Lu et al., 2022)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fedbn.errors import UserError
from fedbn.statistics.moments import Moments
from fedbn.strategies.similarity import SimilarityWeighted


@dataclass(frozen=True)
class FedAP(SimilarityWeighted):
    r"""Client :math:`i` gets :math:`\sum_j W_{ij}\theta_j`; :math:`W_{ii}=\lambda`, others :math:`\propto 1/d_{ij}`.

    :math:`d_{ij}=\sum_\ell \sqrt{\|\mu_i-\mu_j\|^2+\|\sigma_i-\sigma_j\|^2}` over all BN layers' inputs, measured once
    after a warm-up of FedBN (f-FedAP). https://arxiv.org/abs/2112.00734. Unseen users get the mean of all
    clients.

    Attributes:
        lam: weight of a client's own parameters.

    >>> import torch; FedAP(lam=0.5).weights(torch.tensor([0.0, 1.0, 3.0]), 0).tolist()
    [0.5, 0.375, 0.125]
    """

    name = "fedap"
    title = "FedAP"
    about = "FedBN; parameters weighted by distance of statistics; options lam, warm_up"
    source = "Lu et al. 2022"
    lam: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.lam <= 1:
            raise UserError(f"fedap: lam must be between 0 and 1, not {self.lam:g}")

    def distance(self, a: dict[str, Moments], b: dict[str, Moments]) -> float:
        return sum(float(a[path].w2(b[path])) for path in a)

    def weights(self, distances: Tensor, index: int) -> Tensor:
        proximity = 1 / distances.clamp_min(1e-12)
        if index < 0:
            return proximity / proximity.sum()
        proximity[index] = 0
        out = (1 - self.lam) * proximity / proximity.sum()
        out[index] = self.lam
        return out

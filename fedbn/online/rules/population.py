r"""Population statistics as pseudo-windows, gradually outweighed by the user's own."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fedbn.errors import UserError
from fedbn.online.rules.base import INF
from fedbn.online.rules.pseudo import Pseudo
from fedbn.online.statistics import Prior


@dataclass(frozen=True)
class Population(Pseudo):
    r"""`pseudo` that starts from the statistics of seen users under the trained model, with a weight of

    .. math:: n_{0,c} = b\,s_c^2/\tau_c^2

    windows in channel c. The larger the variance between users' means (:math:`\tau^2`) relative to that between windows
    of one user (:math:`s^2`), the faster the user's own windows dominate. This weight minimizes the expected squared
    error for independent windows (Efron, Morris, 1975, *Data analysis using Stein's estimator*). Successive windows of
    one activity are correlated: ``bout`` of them count as one independent window.

    The initial statistics and :math:`s^2/\tau^2` are part of the prior (`fedbn.online.prior.population_prior`).
    Proposed by this project. The default was chosen on people who are in no published table (docs/adaptation.md).

    Attributes:
        bout: b.
        cap: number of windows after which earlier ones are discounted.
    """

    name = "population"
    about = "seen users' statistics as a prior, merged with the user's own"
    source = "after Efron, Morris 1975, https://doi.org/10.1080/01621459.1975.10479864"
    requires = "n0"
    ranges = (("bout", 0, INF),)
    n0: float = 0.0
    bout: float = 4.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.n0:
            raise UserError("rule 'population' takes n0 from the prior: scale it by bout=..., or use pseudo:n0=...")

    def pseudo_count(self, prior: Prior) -> Tensor:
        if prior.n0 is None:
            raise UserError(
                "rule 'population' needs the variance between users: personalize(model, rule, "
                "prior=population_prior(model, users)) with windows of seen users"
            )
        return self.bout * prior.n0

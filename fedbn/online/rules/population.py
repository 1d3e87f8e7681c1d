r"""What the population knows of its users, gradually outweighed by the user's own windows."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fedbn.errors import UserError
from fedbn.online.rules.pseudo import Pseudo
from fedbn.online.statistics import Prior


@dataclass(frozen=True)
class Population(Pseudo):
    r"""`pseudo` that starts from what seen users' statistics are under the finished model, worth

    .. math:: n_{0,c} = b\,s_c^2/\tau_c^2

    windows in channel c: the more users differ in it (:math:`\tau^2`, variance of users' means) against how much one
    user's windows do (:math:`s^2`), the sooner the start is given up. That is the weight with the least expected
    squared error for independent windows (Efron, Morris, 1975, *Data analysis using Stein's estimator*); successive
    windows of one activity say much the same, and ``bout`` is how many of them say as much as one that is independent.

    The start and :math:`s^2/\tau^2` come with the prior (`fedbn.online.prior.population_prior`). This project's; the
    default was chosen on people who are in no published table (docs/adaptation.md).

    Attributes:
        bout: b.
        cap: windows after which old ones fade.
    """

    name = "population"
    about = "seen users' statistics, each channel worth what users agree in it, merged with the user's"
    source = "after Efron, Morris 1975"
    wants = "n0"

    n0: float = 0.0
    bout: float = 4.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.within("bout", 0)
        if self.n0:
            raise UserError("rule 'population' takes n0 from the prior: scale it by bout=..., or use pseudo:n0=...")

    def worth(self, prior: Prior) -> Tensor:
        if prior.n0 is None:
            raise UserError(
                "rule 'population' needs to know how users differ: personalize(model, rule, "
                "prior=population_prior(model, people)) with windows of seen users"
            )
        return self.bout * prior.n0

"""APFL: a personal model mixed with the shared one (Deng, Kamani, Mahdavi, 2020)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedbn.errors import UserError
from fedbn.nn.roles import Role, State
from fedbn.personalization.base import Personalization, Work


@dataclass(frozen=True)
class APFL(Personalization):
    r"""A client is served :math:`\bar v=\alpha v+(1-\alpha)w`; :math:`v` follows the gradient at :math:`\bar v`.

    https://arxiv.org/abs/2003.13461. The shared model is trained as ever; then :math:`v` takes as many steps, each
    :math:`v \leftarrow v-\eta\alpha\nabla f(\bar v)`, against the shared model the client has just trained. The mixed
    model has statistics of its own.

    Attributes:
        alpha: weight of the personal model.

    >>> APFL(alpha=0.25).alpha
    0.25
    """

    name = "apfl"
    about = "a personal model mixed with the shared one; option alpha"
    source = "Deng et al. 2020"
    alpha: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise UserError(f"apfl: alpha must be between 0 and 1, not {self.alpha:g}")

    def train(self, work: Work) -> float:
        loss = work.fit(work.model)
        shared = work.state()
        work.load(self._mixed(work, shared))
        # A step on the mixture moves v by alpha times the gradient, hence the mixture itself by alpha squared.
        work.fit(work.model, before_step=self._scale, purpose="apfl")
        work.aside = self._personal(work, shared)
        work.load(shared)
        return loss

    def serve(self, work: Work) -> State:
        return self._mixed(work, work.state())

    def _scale(self, model: nn.Module) -> None:
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.grad.mul_(self.alpha**2)

    def _mixed(self, work: Work, shared: State) -> State:
        """Parameters of the mixture; statistics as the mixture left them last."""
        trained = work.names(Role.BODY, Role.HEAD, Role.AFFINE)
        own = work.aside
        return {
            k: (torch.lerp(v, own[k], self.alpha) if k in trained else own[k]) if k in own else v
            for k, v in shared.items()
        }

    def _personal(self, work: Work, shared: State) -> State:
        trained = work.names(Role.BODY, Role.HEAD, Role.AFFINE)
        mixed = work.state()

        def unmix(key: str, value: Tensor) -> Tensor:
            if key not in trained:
                return value
            if self.alpha == 0:
                return work.aside.get(key, shared[key])
            return shared[key] + (value - shared[key]) / self.alpha

        return {k: unmix(k, v) for k, v in mixed.items()}

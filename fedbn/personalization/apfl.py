"""APFL: a personal model mixed with the shared one (Deng, Kamani, Mahdavi, 2020)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedbn.errors import UserError
from fedbn.nn.roles import Role, State
from fedbn.personalization.base import ClientTrainer, Personalization


@dataclass(frozen=True)
class APFL(Personalization):
    r"""Clients use the mixture :math:`\bar v=\alpha v+(1-\alpha)w`; :math:`v` follows the gradient at :math:`\bar v`.

    https://arxiv.org/abs/2003.13461. The shared model is trained as usual; then :math:`v` takes equally many steps
    :math:`v \leftarrow v-\eta\alpha\nabla f(\bar v)`, where :math:`w` is the shared model that the client has just
    trained. The mixture has its own BN statistics.

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

    def train(self, trainer: ClientTrainer) -> float:
        loss = trainer.fit(trainer.model)
        shared = trainer.state()
        trainer.load(self._mixed(trainer, shared))
        # A step on the mixture moves v by alpha times the gradient, hence the mixture itself by alpha squared.
        trainer.fit(trainer.model, on_before_optimizer_step=self._scale, purpose="apfl")
        trainer.method_state = self._personal(trainer, shared)
        trainer.load(shared)
        return loss

    def personalized_state(self, trainer: ClientTrainer) -> State:
        return self._mixed(trainer, trainer.state())

    def _scale(self, model: nn.Module) -> None:
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.grad.mul_(self.alpha**2)

    def _mixed(self, trainer: ClientTrainer, shared: State) -> State:
        """State of the mixture: mixed parameters, and the mixture's last statistics."""
        trained = trainer.names(Role.BODY, Role.HEAD, Role.AFFINE)
        own = trainer.method_state
        return shared | own | {k: torch.lerp(shared[k], own[k], self.alpha) for k in own if k in trained}

    def _personal(self, trainer: ClientTrainer, shared: State) -> State:
        trained = trainer.names(Role.BODY, Role.HEAD, Role.AFFINE)
        mixed = trainer.state()

        def unmix(key: str, value: Tensor) -> Tensor:
            if key not in trained:
                return value
            if self.alpha == 0:
                return trainer.method_state.get(key, shared[key])
            return shared[key] + (value - shared[key]) / self.alpha

        return {k: unmix(k, v) for k, v in mixed.items()}

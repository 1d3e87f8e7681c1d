"""APFL: a personal model mixed with the shared one (Deng, Kamani, Mahdavi, 2020)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fedbn.errors import UserError
from fedbn.nn.roles import State
from fedbn.personalization.base import ClientTrainer, Personalization


@dataclass(frozen=True)
class APFL(Personalization):
    r"""Clients use the mixture :math:`\bar v=\alpha v+(1-\alpha)w`; :math:`v` follows the gradient at :math:`\bar v`.

    https://arxiv.org/abs/2003.13461. The shared model is trained as usual; then :math:`v` takes equally many steps
    :math:`v \leftarrow v-\eta\,(\alpha\nabla f(\bar v)+\lambda v)`, where :math:`w` is the shared model that the
    client has just trained and :math:`\lambda` the weight decay. In the paper, steps of :math:`w` and :math:`v`
    alternate. In a client's first round, :math:`v` starts from the received model. The mixture has its own BN
    statistics.

    Attributes:
        alpha: weight of the personal model.

    >>> APFL(alpha=0.25).alpha
    0.25
    """

    name = "apfl"
    title = "APFL"
    about = "a personal model mixed with the shared one; option alpha"
    source = "Deng et al. 2020"
    alpha: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise UserError(f"apfl: alpha must be between 0 and 1, not {self.alpha:g}")

    def train(self, trainer: ClientTrainer) -> float:
        received = trainer.state()
        loss = trainer.fit(trainer.model)
        shared = trainer.state()
        trainer.load(trainer.method_state or received)
        trainer.fit(_Mixture(trainer.model, shared, self.alpha), pull=(0.0, {}), purpose="apfl")
        trainer.method_state = trainer.state()
        trainer.load(shared)
        return loss

    def personalized_state(self, trainer: ClientTrainer) -> State:
        shared, personal = trainer.state(), trainer.method_state
        if not personal:
            return shared
        return personal | _mix(
            shared, {name: personal[name] for name, _ in trainer.model.named_parameters()}, self.alpha
        )


class _Mixture(nn.Module):
    """A personal model whose forward passes use the mixture of its parameters with those of a shared state."""

    def __init__(self, personal: nn.Module, shared: State, alpha: float) -> None:
        super().__init__()
        self.personal, self.shared, self.alpha = personal, shared, alpha

    def forward(self, x: Tensor) -> Tensor:
        mixture = _mix(self.shared, dict(self.personal.named_parameters()), self.alpha)
        return cast(Tensor, functional_call(self.personal, mixture, (x,)))


def _mix(shared: State, personal: Mapping[str, Tensor], alpha: float) -> State:
    return {name: torch.lerp(shared[name], value, alpha) for name, value in personal.items()}

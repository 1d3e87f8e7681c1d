"""FedProx: a proximal term towards the received parameters (Li, Sahu, Zaheer, Sanjabi, Talwalkar, Smith, 2020)."""

from __future__ import annotations

from dataclasses import dataclass

from fedbn.errors import UserError
from fedbn.nn.roles import Role
from fedbn.personalization.base import ClientTrainer, Personalization


@dataclass(frozen=True)
class FedProx(Personalization):
    r"""Adds :math:`\frac\mu2\|w-w^{received}\|^2` over body and head to the local loss.

    https://arxiv.org/abs/1812.06127

    Attributes:
        mu: weight of the proximal term.

    >>> FedProx(mu=0.1).mu
    0.1
    """

    name = "fedprox"
    title = "FedProx"
    about = "a proximal term towards the received parameters; option mu"
    source = "Li et al. 2020"
    mu: float = 0.01

    def __post_init__(self) -> None:
        if self.mu < 0:
            raise UserError(f"fedprox: mu must be 0 or more, not {self.mu:g}")

    def train(self, trainer: ClientTrainer) -> float:
        received = trainer.state()
        return trainer.fit(trainer.model, pull=(self.mu, {k: received[k] for k in trainer.names(Role.BODY, Role.HEAD)}))

"""Ditto: a personal model with a penalty on its distance to the global one (Li, Hu, Beirami, Smith, ICML 2021)."""

from __future__ import annotations

from dataclasses import dataclass

from fedbn.errors import UserError
from fedbn.nn.roles import State
from fedbn.personalization.base import ClientTrainer, Personalization


@dataclass(frozen=True)
class Ditto(Personalization):
    r"""Each client also trains a personal model :math:`v_k` on :math:`f_k(v)+\frac\lambda2\|v-w\|^2`.

    https://arxiv.org/abs/2012.04221. The personal model has its own BN statistics, takes as many steps as the shared
    model :math:`w`, and is used for evaluation on the client.

    Attributes:
        lam: weight of the penalty on the distance to the received shared model.

    >>> Ditto(lam=0.5).lam
    0.5
    """

    name = "ditto"
    title = "Ditto"
    about = "a second, personal model, regularized towards the shared one; option lam"
    source = "Li et al. 2021"
    lam: float = 0.1

    def __post_init__(self) -> None:
        if self.lam < 0:
            raise UserError(f"ditto: lam must be 0 or more, not {self.lam:g}")

    def train(self, trainer: ClientTrainer) -> float:
        received = trainer.state()
        loss = trainer.fit(trainer.model)
        shared = trainer.state()
        trainer.load(trainer.method_state or received)
        trainer.fit(trainer.model, pull=(self.lam, received), purpose="ditto")
        trainer.method_state = trainer.state()
        trainer.load(shared)
        return loss

    def personalized_state(self, trainer: ClientTrainer) -> State:
        return trainer.method_state or trainer.state()

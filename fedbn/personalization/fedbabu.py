"""FedBABU: the head is never trained in federation, only during personalization (Oh, Kim, Yun, ICLR 2022)."""

from __future__ import annotations

from dataclasses import dataclass

from fedbn.nn.roles import Role, State
from fedbn.personalization.base import ClientTrainer, Personalization


@dataclass(frozen=True)
class FedBABU(Personalization):
    """Body aggregation and body update, the head at its initial value; then fine-tuning.

    https://arxiv.org/abs/2106.06042

    Attributes:
        epochs: passes of fine-tuning, on all parameters, before evaluation on the client.
        lr: learning rate of fine-tuning.

    >>> FedBABU().epochs
    1
    """

    name = "fedbabu"
    about = "the classifier stays at its initial value in training; clients fine-tune"
    source = "Oh et al. 2022"
    epochs: int = 1
    lr: float = 0.01

    def train(self, trainer: ClientTrainer) -> float:
        return trainer.fit(trainer.model, only=trainer.names(*Role) - trainer.names(Role.HEAD))

    def personalized_state(self, trainer: ClientTrainer) -> State:
        trainer.fit(trainer.model, epochs=self.epochs, lr=self.lr, purpose="finetune")
        return trainer.state()

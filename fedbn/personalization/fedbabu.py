"""FedBABU: the head is trained only during personalization, never in federated rounds (Oh, Kim, Yun, ICLR 2022)."""

from __future__ import annotations

from dataclasses import dataclass

from fedbn.nn.roles import Role, State
from fedbn.personalization.base import ClientTrainer, Personalization


@dataclass(frozen=True)
class FedBABU(Personalization):
    """The body is trained and aggregated with a fixed initial head; clients then fine-tune.

    https://arxiv.org/abs/2106.06042

    Attributes:
        epochs: epochs of fine-tuning of all parameters before evaluation on the client.
        lr: learning rate of fine-tuning.

    >>> FedBABU().epochs
    1
    """

    name = "fedbabu"
    about = "the classifier keeps its initial value in training; clients fine-tune"
    source = "Oh et al. 2022"
    epochs: int = 1
    lr: float = 0.01

    def train(self, trainer: ClientTrainer) -> float:
        return trainer.fit(trainer.model, only=trainer.names(*Role) - trainer.names(Role.HEAD))

    def personalized_state(self, trainer: ClientTrainer) -> State:
        trainer.fit(trainer.model, epochs=self.epochs, lr=self.lr, purpose="finetune")
        return trainer.state()

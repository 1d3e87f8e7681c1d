"""Local fine-tuning: the shared model, trained further on each client's own data before it is used there."""

from __future__ import annotations

from dataclasses import dataclass

from fedbn.nn.roles import State
from fedbn.personalization.base import ClientTrainer, Personalization


@dataclass(frozen=True)
class FineTune(Personalization):
    """FedAvg + fine-tuning. Yu, Bagdasaryan, Shmatikov, 2020, https://arxiv.org/abs/2002.04758

    Nothing changes in the rounds. An unseen user, who has no labels, is served the shared model.

    Attributes:
        epochs: passes over the client's training data.
        lr: learning rate.

    >>> FineTune(epochs=2).epochs
    2
    """

    name = "finetune"
    about = "the model is trained further on each client's data before it is evaluated there"
    source = "Yu et al. 2020"
    epochs: int = 1
    lr: float = 0.01

    def personalized_state(self, trainer: ClientTrainer) -> State:
        trainer.fit(trainer.model, epochs=self.epochs, lr=self.lr, purpose="finetune")
        return trainer.state()

"""Local fine-tuning: each client trains the final shared model further on its own data."""

from __future__ import annotations

from dataclasses import dataclass

from fedbn.nn.roles import State
from fedbn.personalization.base import ClientTrainer, Personalization


@dataclass(frozen=True)
class FineTune(Personalization):
    """FedAvg + fine-tuning. Yu, Bagdasaryan, Shmatikov, 2020, https://arxiv.org/abs/2002.04758

    The training rounds are unchanged. An unseen user has no labels and uses the shared model.

    Attributes:
        epochs: epochs over the client's training data.
        lr: learning rate.

    >>> FineTune(epochs=2).epochs
    2
    """

    name = "finetune"
    title = "fine-tuning"
    about = "clients fine-tune the model on their own data before evaluation"
    source = "Yu et al. 2020"
    epochs: int = 1
    lr: float = 0.01

    def personalized_state(self, trainer: ClientTrainer) -> State:
        trainer.fit(trainer.model, epochs=self.epochs, lr=self.lr, purpose="finetune")
        return trainer.state()

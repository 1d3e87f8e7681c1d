"""FedBABU: the head is trained only during personalization, never in federated rounds (Oh, Kim, Yun, ICLR 2022)."""

from __future__ import annotations

from dataclasses import dataclass

from fedbn.nn.roles import Role
from fedbn.personalization.base import ClientTrainer, require_trained
from fedbn.personalization.finetune import FineTune


@dataclass(frozen=True)
class FedBABU(FineTune):
    """The body is trained and aggregated with a fixed initial head; clients then fine-tune.

    https://arxiv.org/abs/2106.06042

    Attributes:
        epochs: epochs of fine-tuning of all parameters before evaluation on the client.
        lr: learning rate of fine-tuning.

    >>> FedBABU().epochs
    1
    """

    name = "fedbabu"
    title = "FedBABU"
    about = "the classifier keeps its initial value in training; clients fine-tune"
    source = "Oh et al. 2022"

    def validate_model(self, trainable: dict[str, Role]) -> None:
        require_trained(self.name, trainable, head=False)

    def train(self, trainer: ClientTrainer) -> float:
        return trainer.fit(trainer.model, only=trainer.names(*Role) - trainer.names(Role.HEAD))

"""FedRep: head first, then body (Collins, Hassani, Mokhtari, Shakkottai, ICML 2021)."""

from __future__ import annotations

from dataclasses import dataclass

from fedbn.nn.roles import Role
from fedbn.personalization.base import ClientTrainer, Personalization, require_trained
from fedbn.strategies.ownership import LOCAL


@dataclass(frozen=True)
class FedRep(Personalization):
    """A local head is trained on the received body, then the body on the new head. https://arxiv.org/abs/2102.07078

    Attributes:
        head_epochs: epochs for the head; the plan's local epochs then train the other parameters.

    >>> FedRep().head_epochs
    1
    """

    name = "fedrep"
    title = "FedRep"
    about = "local head, trained before the body in every round"
    source = "Collins et al. 2021"
    head = LOCAL
    head_epochs: int = 1

    def validate_model(self, trainable: dict[str, Role]) -> None:
        for head in (True, False):
            require_trained(self.name, trainable, head=head)

    def train(self, trainer: ClientTrainer) -> float:
        head = trainer.names(Role.HEAD)
        trainer.fit(trainer.model, only=head, epochs=self.head_epochs, purpose="head")
        return trainer.fit(trainer.model, only=trainer.names(*Role) - head)

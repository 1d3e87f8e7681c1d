"""A normalization strategy combined with a personalization method."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from typing import Any

from fedbn.nn.roles import Role
from fedbn.personalization.base import Personalization, personalizations
from fedbn.plugins import is_known, parse, render, text_of
from fedbn.strategies.base import NormStrategy, strategies
from fedbn.strategies.base import strategy as parse_strategy
from fedbn.strategies.global_naive import GlobalNaive
from fedbn.strategies.ownership import LOCAL, Owner


@dataclass(frozen=True)
class Treatment:
    """A normalization strategy and a personalization method.

    >>> str(treatment("groupnorm:groups=4"))
    'groupnorm:groups=4'
    """

    norm: NormStrategy
    personal: Personalization = field(default_factory=Personalization)

    def owners(self) -> dict[Role, Owner]:
        """Owner of each role."""
        return self.personal.owners(self.norm.owners())

    @property
    def personalizes(self) -> bool:
        """Whether the treatment has a personalization method."""
        return type(self.personal) is not Personalization

    @property
    def is_local_only(self) -> bool:
        """Whether the body is local, so that unseen users have no model."""
        return self.owners()[Role.BODY] is LOCAL

    def __str__(self) -> str:
        norm = render(self.norm)
        return f"{norm}+{render(self.personal)}" if self.personalizes else norm


def treatment(text: str) -> Treatment:
    """Parse a treatment such as ``fedbn`` or ``groupnorm+ditto:lam=0.5``; a method alone is combined with FedAvg.

    Raises:
        UserError: unknown strategy, method or option; the message suggests the nearest one.

    >>> str(treatment("fedavg")), str(treatment("FedProx:mu=0.1"))
    ('global-naive', 'global-naive+fedprox:mu=0.1')
    """
    norm, plus, personal = text.partition("+")
    if not plus and is_known(text.split(":")[0], personalizations()):
        norm, plus, personal = GlobalNaive.name, "+", text
    strategy = parse_strategy(norm)
    if not plus:
        return Treatment(strategy)
    return Treatment(strategy, parse(personal, "personalization", personalizations(), Personalization))


def treatment_text(chosen: Any) -> str:
    """The text that `treatment` converts to a treatment that is given as an object.

    Args:
        chosen: a text, a strategy, a personalization method or the class of one, or a `Treatment`.

    Raises:
        UserError: another object.

    >>> treatment_text(GlobalNaive), treatment_text(Treatment(GlobalNaive(), Personalization()))
    ('global-naive', 'global-naive')
    """
    if isinstance(chosen, Treatment):
        text = treatment_text(chosen.norm)
        return f"{text}+{_method_text(chosen.personal)}" if chosen.personalizes else text
    if isinstance(chosen, Personalization) or (inspect.isclass(chosen) and issubclass(chosen, Personalization)):
        return f"{GlobalNaive.name}+{_method_text(chosen)}"
    return text_of(chosen, "strategy", strategies(), NormStrategy)


def _method_text(chosen: Any) -> str:
    return text_of(chosen, "personalization", personalizations(), Personalization)

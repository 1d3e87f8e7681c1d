"""A run is a value: scenario, model, strategy, plan and seed. Its JSON is its identity."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from fedbn.config import Plan
from fedbn.data.partition import parse_partition
from fedbn.data.shift import parse_shift
from fedbn.models import factory
from fedbn.online.rules.base import client_rule
from fedbn.personalization.treatment import treatment
from fedbn.plugins import build, render, table
from fedbn.privacy.mechanism import render_privacy
from fedbn.scenarios.base import scenario


@dataclass(frozen=True)
class Run:
    """Everything that determines a result, and nothing else.

    Attributes:
        scenario: text of a scenario, e.g. ``hapt``.
        strategy: text of a treatment, e.g. ``groupnorm:groups=4`` or ``fedbn+ditto``.
        seed: decides who is unseen, the initial weights, sampling and shuffling.
        model: name of a model or ``package.module:factory``; empty for the scenario's own.
        partition: text of a partition of the seen users' pooled data; ``natural`` leaves users as they are.
        shift: text of a feature shift; empty for none.
        plan: training and evaluation settings.
        validation: test on a held-out part of the training recordings instead (for tuning).
        device: where tensors live.
        rule: text of the rule by which clients personalize in the online column, window by window; empty: the
            pseudo-count that ``plan.online_prior`` describes, in blocks.
        privacy: text of how clients' messages are protected, e.g. ``clip=1:noise=0.5``; empty for not at all.

    >>> Run("digits8", "fedbn", seed=1).id == Run("digits8", "fedbn", seed=1).id
    True
    """

    scenario: str
    strategy: str
    seed: int = 0
    model: str = ""
    partition: str = "natural"
    shift: str = ""
    plan: Plan = field(default_factory=Plan)
    validation: bool = False
    device: str = "cpu"
    rule: str = ""
    privacy: str = ""

    @property
    def id(self) -> str:
        """A name that is also a digest: strategy, seed and ten hexadecimal digits."""
        digest = hashlib.sha256(self.to_json().encode()).hexdigest()[:10]
        return f"{self.strategy.replace(':', '_').replace('=', '').replace('+', '-')}-s{self.seed}-{digest}"

    def to_json(self) -> str:
        """Canonical JSON."""
        return json.dumps(asdict(self), sort_keys=True)

    @staticmethod
    def from_dict(values: dict[str, Any]) -> Run:
        """From parsed JSON or TOML.

        Raises:
            UserError: an unknown key or a value of the wrong type.
        """
        plan = build(Plan, table(values.get("plan", {}), "plan"), "plan")
        rest = {k: v for k, v in values.items() if k != "plan"}
        return replace(build(Run, rest, "run"), plan=plan)

    def resolved(self) -> Run:
        """Every text parsed, checked and written in its shortest form; the scenario's model filled in.

        Raises:
            UserError: anything unknown, with the nearest name.
        """
        chosen = scenario(self.scenario)
        model = self.model or chosen.model
        factory(model)
        return replace(
            self,
            scenario=render(chosen),
            strategy=str(treatment(self.strategy)),
            model=model,
            partition=parse_partition(self.partition or "natural"),
            shift=parse_shift(self.shift),
            rule=render(client_rule(self.rule)) if self.rule else "",
            privacy=render_privacy(self.privacy),
        )


def plan_for(scenario_text: str, **overrides: Any) -> Plan:
    """The scenario's plan with overrides that are not None."""
    values = dict(scenario(scenario_text).plan) | {k: v for k, v in overrides.items() if v is not None}
    return build(Plan, values, "plan")

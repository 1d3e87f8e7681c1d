"""A run as a value: scenario, strategy, seed, model and plan. Its JSON is its identity."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

from fedbn.augment.base import augmentation_text
from fedbn.config import Conditions, Plan, RunOptions, parts
from fedbn.data.partition import parse_partition
from fedbn.data.shift import parse_shift
from fedbn.models import factory
from fedbn.online.rules.base import client_rule
from fedbn.optim.base import optimizer, optimizer_text
from fedbn.optim.schedules import schedule
from fedbn.personalization.treatment import treatment
from fedbn.plugins import build, render, table
from fedbn.privacy.mechanism import render_privacy
from fedbn.scenarios.base import scenario
from fedbn.tasks import Task, parse_task, render_task


@dataclass(frozen=True)
class Run(RunOptions):
    """Everything that determines a result, and nothing else.

    Raises:
        UserError: a value is out of bounds.

    >>> Run("digits8", "fedbn", seed=1).id == Run("digits8", "fedbn", seed=1).id
    True
    """

    @property
    def id(self) -> str:
        """Unique name: strategy, seed and a digest of ten hexadecimal digits."""
        digest = hashlib.sha256(self.to_json().encode()).hexdigest()[:10]
        return f"{self.strategy.replace(':', '_').replace('=', '').replace('+', '-')}-s{self.seed}-{digest}"

    def to_json(self) -> str:
        """Canonical JSON, without what does not change a number: the scenario's task, and options of unused rules."""
        return self._json  # every checkpoint has it

    @cached_property
    def _json(self) -> str:
        values = asdict(self) | {"plan": plan_values(self.plan)}
        return json.dumps(values if self.task else {k: v for k, v in values.items() if k != "task"}, sort_keys=True)

    @staticmethod
    def from_dict(values: dict[str, Any]) -> Run:
        """Build a run from parsed JSON or TOML.

        Raises:
            UserError: an unknown key or a value of the wrong type.
        """
        plan = build(Plan, table(values.get("plan", {}), "plan"), "plan")
        rest = {k: v for k, v in values.items() if k != "plan"}
        return replace(build(Run, rest, "run"), plan=plan)

    def resolved(self) -> Run:
        """The run with all texts parsed, checked and written in their shortest form, and with the scenario's model.

        Raises:
            UserError: an unknown name, with the nearest one.
        """
        chosen = scenario(self.scenario)
        model = self.model or chosen.model
        factory(model)
        chosen_task = render_task(self.task or chosen.task)
        return replace(
            self,
            scenario=chosen.text,
            strategy=str(treatment(self.strategy)),
            model=model,
            task="" if chosen_task == render_task(chosen.task) else chosen_task,
            partition=parse_partition(self.partition or "natural"),
            shift=parse_shift(self.shift),
            rule=render(client_rule(self.rule)) if self.rule else "",
            privacy=render_privacy(self.privacy),
            head=",".join(parts(self.head)),
            private=",".join(parts(self.private)),
            plan=resolved_plan(self.plan),
        )


def plan_values(plan: Plan) -> dict[str, Any]:
    """Plain values of a plan; without those of the rule of ``patience`` that are the defaults.

    >>> "patience" in plan_values(Plan()), "patience" in plan_values(Plan(patience=3))
    (False, True)
    """
    added, default = ("patience", "min_delta"), Plan()
    return {k: v for k, v in asdict(plan).items() if k not in added or v != getattr(default, k)}


def task_of(run: Conditions) -> Task:
    """The task of a run, before it has seen any targets.

    Raises:
        UserError: unknown name or option.
    """
    return parse_task(run.task or scenario(run.scenario).task)


def plan_for(scenario_text: str, **overrides: Any) -> Plan:
    """The scenario's plan with overrides that are not None, with all texts checked.

    An optimizer that is given without a learning rate has its own default.

    Raises:
        UserError: as `resolved_plan`, or a value of the wrong type.

    >>> plan_for("digits8", optimizer="adam").lr
    0.001
    """
    given = {k: option_text(k, v) for k, v in overrides.items() if v is not None}
    if "optimizer" in given and "lr" not in given and (lr := optimizer(given["optimizer"]).default_lr):
        given["lr"] = lr
    return resolved_plan(build(Plan, dict(scenario(scenario_text).plan) | given, "plan"))


def option_text(name: str, value: Any) -> Any:
    """The text of a plan's option that is given as an object; other values are returned unchanged.

    >>> from fedbn.optim.adamw import AdamW
    >>> option_text("optimizer", AdamW(weight_decay=0.1))
    'adamw:weight_decay=0.1'
    """
    texts: dict[str, Callable[[Any], str]] = {"optimizer": optimizer_text, "augment": augmentation_text}
    return texts[name](value) if name in texts else value


def resolved_plan(plan: Plan) -> Plan:
    """The plan with all texts checked and in their shortest form.

    Raises:
        UserError: an unknown name or option, or a setting that the optimizer does not use.
    """
    optimizer(plan.optimizer).validate(plan)
    return replace(
        plan,
        optimizer=optimizer_text(plan.optimizer),
        schedule=render(schedule(plan.schedule)),
        augment=augmentation_text(plan.augment),
    )

"""An experiment: one scenario, several strategies, several paired seeds, one plan. It is a value, like a run."""

from __future__ import annotations

import json
import tomllib
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from fedbn.config import PLAN_FIELDS, Plan
from fedbn.errors import UserError, unknown
from fedbn.federation.run import Run, plan_for
from fedbn.plugins import build, table
from fedbn.scenarios.base import scenario

DEFAULT_STRATEGIES = (
    "global-naive",
    "global-pooled",
    "fedbn",
    "silobn",
    "groupnorm",
    "local",
    "centralized",
)

GRID = (0.01, 0.03, 0.1, 0.3)
"""Learning rates tried for every strategy when tuning; a factor of about three apart."""


@dataclass(frozen=True)
class Experiment:
    """What is compared.

    Attributes:
        scenario: text of a scenario.
        strategies: texts of strategies; the first is the reference of paired differences.
        seeds: how many paired seeds, 0 to seeds - 1.
        model, partition, shift, device, rule, privacy: as in `Run`.
        tune: learning rates to choose from for each strategy; empty for the plan's own.
        rates: learning rates by strategy, where they differ from the plan's; the scenario's, unless a rate was given.
        plan: training and evaluation settings.
    """

    scenario: str
    strategies: tuple[str, ...] = DEFAULT_STRATEGIES
    seeds: int = 3
    model: str = ""
    partition: str = "natural"
    shift: str = ""
    device: str = "cpu"
    rule: str = ""
    privacy: str = ""
    tune: tuple[float, ...] = ()
    rates: dict[str, float] = field(default_factory=dict)
    plan: Plan = field(default_factory=Plan)

    def run(self, strategy: str, seed: int, *, lr: float | None = None, validation: bool = False) -> Run:
        """One of the experiment's runs."""
        plan = replace(self.plan, lr=lr or self.rates.get(strategy, self.plan.lr))
        if validation:
            plan = replace(plan, eval_every=plan.rounds)
        return Run(
            self.scenario,
            strategy,
            seed,
            self.model,
            self.partition,
            self.shift,
            plan,
            validation,
            self.device,
            self.rule,
            self.privacy,
        )

    def resolved(self) -> Experiment:
        """All texts checked and in their shortest form.

        Raises:
            UserError: unknown names or options, strategies given twice, no seeds.
        """
        if self.seeds < 1:
            raise UserError(f"--seeds must be at least 1, not {self.seeds}")
        if not self.strategies:
            raise UserError("no strategy given: see `fedbn list strategies`")
        if any(lr <= 0 for lr in self.tune):
            raise UserError(f"learning rates to tune over must be positive: {', '.join(map(str, self.tune))}")
        if wrong := [s for s, lr in self.rates.items() if not lr > 0]:
            raise UserError(f"rates must be positive learning rates; look at {', '.join(wrong)}")
        runs = [self.run(s, 0).resolved() for s in self.strategies]
        names = tuple(r.strategy for r in runs)
        if twice := {n for n in names if names.count(n) > 1}:
            raise UserError(f"strategies given twice: {', '.join(sorted(twice))}")
        first = runs[0]
        return replace(
            self,
            scenario=first.scenario,
            strategies=names,
            model=first.model,
            partition=first.partition,
            shift=first.shift,
            privacy=first.privacy,
            rule=first.rule,
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as in a run file."""
        return json.loads(json.dumps(asdict(self)))

    @staticmethod
    def from_dict(values: dict[str, Any]) -> Experiment:
        """From parsed JSON or TOML; the plan starts from the scenario's own.

        Raises:
            UserError: unknown keys or wrong types, no scenario.
        """
        if "scenario" not in values:
            raise UserError("no scenario given: see `fedbn list scenarios`")
        settings = table(values.get("plan", {}), "plan")
        for name in settings:
            if name not in PLAN_FIELDS:
                raise unknown("setting in [plan]", name, PLAN_FIELDS)
        plan = plan_for(str(values["scenario"]), **settings)
        rest = {k: v for k, v in values.items() if k != "plan"}
        if "lr" not in settings:
            rest.setdefault("rates", scenario(str(values["scenario"])).rates)
        return replace(build(Experiment, rest, "experiment"), plan=plan)


def read_run_file(path: Path) -> dict[str, Any]:
    """A TOML run file as plain values.

    Raises:
        UserError: missing or not TOML.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read run file {path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"run file {path} is not valid TOML: {error}") from None

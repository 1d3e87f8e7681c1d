"""An experiment as a value: one scenario, several strategies, several paired seeds, one plan."""

from __future__ import annotations

import json
import tomllib
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from fedbn.config import EvaluatedConditions, nest
from fedbn.errors import UserError
from fedbn.federation.run import Run, plan_for
from fedbn.personalization.treatment import treatment
from fedbn.plugins import build, table
from fedbn.scenarios.base import scenario
from simulations.experiments.options import ExperimentOptions


@dataclass(frozen=True)
class Experiment(ExperimentOptions):
    """One scenario, several strategies, several paired seeds, one plan.

    Raises:
        UserError: a value is out of bounds.
    """

    def run(self, strategy: str, seed: int, *, lr: float | None = None, validation: bool = False) -> Run:
        """The run of one strategy and seed."""
        plan = replace(self.plan, lr=lr or self.rates.get(strategy, self.plan.lr))
        if validation:
            plan = replace(plan, eval_every=plan.rounds)
        shared = {f.name: getattr(self, f.name) for f in fields(EvaluatedConditions)} | {"plan": plan}
        return Run(strategy=strategy, seed=seed, validation=validation, **shared)

    def resolved(self) -> Experiment:
        """The experiment with all texts checked and in their shortest form.

        Raises:
            UserError: an unknown name or option, or a strategy given twice.
        """
        if not self.strategies:
            raise UserError("no strategy given: see `fedbn list strategies`")
        if any(lr <= 0 for lr in self.tune):
            raise UserError(f"learning rates to tune over must be positive: {', '.join(map(str, self.tune))}")
        if wrong := [s for s, lr in self.rates.items() if not lr > 0]:
            raise UserError(f"rates must be positive learning rates; look at {', '.join(wrong)}")
        rates = {str(treatment(s)): lr for s, lr in self.rates.items()}
        runs = [self.run(s, 0).resolved() for s in self.strategies]
        names = tuple(r.strategy for r in runs)
        if twice := {n for n in names if names.count(n) > 1}:
            raise UserError(f"strategies given twice: {', '.join(sorted(twice))}")
        texts = {
            k: getattr(runs[0], k)
            for k in ("scenario", "model", "partition", "shift", "privacy", "rule", "head", "private")
        }
        return replace(self, strategies=names, rates=rates, **texts)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as in a run file."""
        return json.loads(json.dumps(asdict(self)))

    @staticmethod
    def from_dict(values: dict[str, Any]) -> Experiment:
        """Build an experiment from parsed JSON or TOML, or from flat options.

        The plan starts from the scenario's plan.

        Args:
            values: fields of `Experiment`. Options of the plan are given in a table ``plan``, or flat among the others.

        Raises:
            UserError: no scenario, an unknown option, or a value of the wrong type.
        """
        values = nest(Experiment, values)
        if "scenario" not in values:
            raise UserError("no scenario given: see `fedbn list scenarios`")
        settings = table(values.get("plan", {}), "plan")
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

"""An experiment as a value: one scenario, several strategies, several paired seeds, one plan."""

from __future__ import annotations

import itertools
import json
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from fedbn.config import EvaluatedConditions, Plan, nest, seed_numbers
from fedbn.errors import UserError, unknown
from fedbn.federation.run import Run, plan_for, plan_values, resolved_plan, task_of
from fedbn.objects import is_reference
from fedbn.personalization.treatment import treatment
from fedbn.plugins import build, table
from fedbn.protocols.base import protocol, protocol_text
from fedbn.scenarios.base import scenario
from fedbn.tasks import render_task
from fedbn.tasks.extra import metric_name
from fedbn_simulations.experiments.options import ExperimentOptions

_BUDGET = ("rounds", "patience", "min_delta", "tolerate")

TUNABLE = tuple(f.name for f in fields(Plan) if f.metadata["panel"] != "Evaluation" and f.name not in _BUDGET)
"""Options of the plan that can be tuned: those of training, except for those of the budget."""


@dataclass(frozen=True)
class Experiment(ExperimentOptions):
    """One scenario, several strategies, several paired seeds, one plan.

    Raises:
        UserError: a value is out of bounds.
    """

    @property
    def seed_numbers(self) -> tuple[int, ...]:
        """The seeds."""
        return seed_numbers(self.seeds)

    def run(self, strategy: str, seed: int, *, tuned: Mapping[str, Any] | None = None, validation: bool = False) -> Run:
        """The run of one strategy and seed, with tuned options of the plan."""
        plan = replace(self.plan, **({"lr": self.rates.get(strategy, self.plan.lr)} | dict(tuned or {})))
        if validation:
            plan = replace(plan, eval_every=plan.rounds, patience=None)  # all candidates have the same budget
        shared = {f.name: getattr(self, f.name) for f in fields(EvaluatedConditions)} | {"plan": plan}
        return Run(strategy=strategy, seed=seed, validation=validation, **shared)

    def candidates(self) -> list[dict[str, Any]]:
        """Combinations of the values to tune over, the first option outermost; empty without tuning.

        Raises:
            UserError: an option that cannot be tuned, or a value of the wrong type or out of bounds.
        """
        if not self.tune:
            return []
        for name, values in self.tune.items():
            if name not in TUNABLE:
                raise unknown("option to tune", name, TUNABLE)
            if not values:
                raise UserError(f"no values to tune {name} over: write {name}=VALUE,VALUE")
        if "optimizer" in self.tune and "lr" not in self.tune:
            raise UserError("optimizers need different learning rates: tune lr too, e.g. lr=0.001,0.01,0.1")
        found: list[dict[str, Any]] = []
        for values in itertools.product(*self.tune.values()):
            texts = dict(zip(self.tune, values, strict=True))
            plan = resolved_plan(build(Plan, asdict(self.plan) | texts, "plan"))
            candidate = {name: getattr(plan, name) for name in texts}
            if candidate in found:
                raise UserError(f"tuned twice: {render_options(candidate)}")
            found.append(candidate)
        return found

    def resolved(self) -> Experiment:
        """The experiment with all texts checked and in their shortest form.

        Raises:
            UserError: an unknown name or option, or a strategy given twice.
        """
        if not self.strategies:
            raise UserError("no strategy given: see `fedbn list strategies`")
        if is_reference(self.metric):
            task = render_task(task_of(self).with_metric(self.metric))
            return replace(self, task=task, metric=metric_name(self.metric)).resolved()
        candidates = self.candidates()
        if self.halvings and 2**self.halvings > max(len(candidates), 1):
            raise UserError(f"halvings={self.halvings} need at least {2**self.halvings} candidates of --tune")
        if self.halvings and 2**self.halvings > self.plan.rounds:
            raise UserError(f"halvings={self.halvings} need at least {2**self.halvings} rounds")
        tune = {n: tuple(dict.fromkeys(str(c[n]) for c in candidates)) for n in self.tune}
        if wrong := [s for s, lr in self.rates.items() if not lr > 0]:
            raise UserError(f"rates must be positive learning rates; look at {', '.join(wrong)}")
        seed_numbers(self.seeds)
        rates = {str(treatment(s)): lr for s, lr in self.rates.items()}
        known = task_of(self).directions
        if self.metric and self.metric not in known:
            raise unknown("metric", self.metric, known)
        runs = [self.run(s, 0).resolved() for s in self.strategies]
        names = tuple(r.strategy for r in runs)
        if twice := {n for n in names if names.count(n) > 1}:
            raise UserError(f"strategies given twice: {', '.join(sorted(twice))}")
        texts = {
            k: getattr(runs[0], k)
            for k in ("scenario", "model", "task", "partition", "shift", "privacy", "rule", "head", "private")
        }
        return replace(self, strategies=names, rates=rates, tune=tune, plan=resolved_plan(self.plan), **texts)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as in a run file, without what does not change any number.

        That is the scenario's task, and the displayed metric unless it selects learning rates.
        """
        values = json.loads(json.dumps(asdict(self) | {"plan": plan_values(self.plan)}))
        unchanged = {
            "task": not self.task,
            "metric": not self.tune or not self.metric,
            "protocol": not self.protocol,
            "halvings": not self.halvings,
        }
        return {k: v for k, v in values.items() if not unchanged.get(k)}

    def deviations(self) -> list[str]:
        """How the experiment differs from its protocol, one sentence; empty without one or without a difference."""
        if not self.protocol:
            return []
        planned = Experiment.from_dict({"strategies": self.strategies, "protocol": self.protocol}).resolved()
        own = {**asdict(self), **asdict(self.plan)}
        expected = {**asdict(planned), **asdict(planned.plan)}
        skipped = ("plan", "seeds", "tune", "halvings", "metric", "device", "rule")
        found = [f"{k} ({own[k]!r}, not {v!r})" for k, v in expected.items() if k not in skipped and own[k] != v]
        found += [f"tuned {', '.join(self.tune)}"] if self.tune else []
        return [f"Deviates from protocol {self.protocol}: {', '.join(found)}."] if found else []

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
        values |= {"protocol": protocol_text(str(values.get("protocol", "")))}
        if values["protocol"]:
            prescribed = nest(Experiment, protocol(values["protocol"]).settings)
            settings = {**prescribed.get("plan", {}), **table(values.get("plan", {}), "plan")}
            values = prescribed | values | {"plan": settings}
        if "scenario" not in values:
            raise UserError("no scenario given: see `fedbn list scenarios`")
        settings = table(values.get("plan", {}), "plan")
        plan = plan_for(str(values["scenario"]), **settings)
        rest = {k: v for k, v in values.items() if k not in ("plan", "tune")}
        if not {"lr", "optimizer"} & settings.keys():
            rest.setdefault("rates", scenario(str(values["scenario"])).rates)
        tune = {name: _texts(tried, name) for name, tried in table(values.get("tune", {}), "tune").items()}
        return replace(build(Experiment, rest, "experiment"), plan=plan, tune=tune)


def _texts(values: Any, name: str) -> tuple[str, ...]:
    if not isinstance(values, list | tuple):
        raise UserError(f"tune, option {name!r} must be a list of values, not {values!r}")
    return tuple(map(str, values))


def render_options(values: Mapping[str, Any]) -> str:
    """Options as they are written on the command line.

    >>> render_options({"lr": 0.1, "optimizer": "adamw"})
    'lr=0.1 optimizer=adamw'
    """
    return " ".join(f"{n}={v:g}" if isinstance(v, float) else f"{n}={v}" for n, v in values.items())


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

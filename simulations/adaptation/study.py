"""Personalize: a federated model meets people it has never seen, and every rule follows the same streams of theirs.

A *cell* is one rule with one start on one kind of stream, for all people of one seed side by side. Each is written
when it is done, as a table of windows; an interrupted study goes on with the cells that are missing. All measures are
computed from these tables, none is stored first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fedbn.config import Plan
from fedbn.errors import UserError
from fedbn.federation.run import Run, plan_for
from fedbn.federation.setup import build_context
from fedbn.online.prequential import Trace
from fedbn.plugins import render
from fedbn.streams import stream
from simulations.adaptation.cells import BOUNDS, SOURCE, Cell, read_cell, run_cell, write_cell
from simulations.adaptation.methods import adaptation_method
from simulations.adaptation.source_model import UserGroup, train_source_model
from simulations.adaptation.warm_starts import start
from simulations.engines.execute import Engine
from simulations.experiments.tasks import Report


@dataclass(frozen=True)
class Study:
    """What is compared.

    Attributes:
        scenario, model, partition, shift, device, plan: of the federated training, as in `Run`.
        strategies: treatments of normalization in training; every rule is tried after each.
        rules: texts of rules and methods; the source is always there.
        streams: texts of kinds of stream.
        starts: texts of starts; every rule is tried with each.
        seeds: how many; each trains a model and holds out other people.
        tune: of rules that differ in their options alone keep the best on seen users' later recordings.
    """

    scenario: str
    rules: tuple[str, ...]
    streams: tuple[str, ...] = ("natural", "iid")
    starts: tuple[str, ...] = ("cold",)
    strategies: tuple[str, ...] = ("global-naive",)
    seeds: int = 2
    model: str = ""
    partition: str = "natural"
    shift: str = ""
    device: str = "cpu"
    tune: bool = False
    plan: Plan = field(default_factory=Plan)

    def resolved(self) -> Study:
        """All texts checked and in their shortest form, the source first.

        Raises:
            UserError: unknown names or options, something given twice, nothing to do.
        """
        if self.seeds < 1:
            raise UserError(f"--seeds must be at least 1, not {self.seeds}")
        if not self.strategies:
            raise UserError("no strategies given: name at least one of --strategies")
        runs = [self.run(0, strategy).resolved() for strategy in self.strategies]
        found: dict[str, Any] = {
            "strategies": tuple(run.strategy for run in runs),
            "rules": (SOURCE, *(t for r in self.rules if (t := adaptation_method(r).text) != SOURCE)),
            "streams": tuple(render(stream(s)) for s in self.streams),
            "starts": tuple(render(start(s)) for s in self.starts),
        }
        for kind, names in found.items():
            if not names:
                raise UserError(f"no {kind} given: name at least one of --{kind}")
            if twice := {n for n in names if names.count(n) > 1}:
                raise UserError(f"{kind} given twice: {', '.join(sorted(twice))}")
        texts = {k: getattr(runs[0], k) for k in ("scenario", "model", "partition", "shift")}
        return replace(self, **texts, **found)

    def run(self, seed: int, strategy: str) -> Run:
        """The training run of one seed and strategy."""
        return Run(self.scenario, strategy, seed, self.model, self.partition, self.shift, self.plan, device=self.device)

    def runs(self) -> list[Run]:
        """All training runs, seeds outermost."""
        return [self.run(seed, strategy) for seed in range(self.seeds) for strategy in self.strategies]


def cells_of(study: Study, users: UserGroup, rules_: Sequence[str]) -> list[Cell]:
    """All cells of one kind of people; bounds and the cold source first."""
    return [
        cell
        for run in study.runs()
        for kind in study.streams
        for cell in (
            *(Cell(run, users, kind, "cold", bound) for bound in (*BOUNDS, SOURCE)),
            *(
                Cell(run, users, kind, begin, text)
                for begin in study.starts
                for text in rules_
                if (begin, text) != ("cold", SOURCE)
            ),
        )
    ]


Done = Callable[[Cell], None]
Results = dict[Cell, tuple[list[Trace], dict[str, Any]]]


def run_study(
    study: Study,
    out: Path,
    *,
    engine: Engine = "grid",
    report: Report = lambda event: None,
    began: Callable[[Sequence[Cell]], None] = lambda cells: None,
    done: Done = lambda cell: None,
) -> tuple[Study, Results]:
    """Conduct a study, or what is left of it.

    Args:
        study: what to compare.
        out: directory; what is finished there is kept.
        engine: how training runs are executed.
        report: told of each round of training.
        began: told of the cells before they begin.
        done: told of each cell.

    Returns:
        The study with the rules that were kept, and all its cells.

    Raises:
        UserError: before anything runs, for whatever can be known then.
    """
    study = study.resolved()
    for run in study.runs():
        build_context(run)
    sources = {run: train_source_model(run, out, engine, report) for run in study.runs()}
    for text in study.streams:
        for source in sources.values():
            source.streams(text, "unseen")

    def all_of(cells: list[Cell]) -> Results:
        began(cells)
        results: Results = {}
        for cell in cells:
            found = read_cell(out, cell)
            if found is None:
                found = run_cell(cell, sources[cell.run])
                write_cell(out, cell, *found)
            results[cell] = found
            done(cell)
        return results

    if study.tune and (contested := families(study.rules)):
        rivals = [text for variants in contested for text in variants]
        scored = all_of([c for c in cells_of(study, "seen", rivals) if c.rule in rivals])
        losers = set(rivals) - set(winners(contested, scored))
        study = replace(study, rules=tuple(r for r in study.rules if r not in losers))
    results = all_of(cells_of(study, "unseen", study.rules))
    check_same_windows(results)
    return study, results


def families(texts: Sequence[str]) -> list[list[str]]:
    """Rules that differ in their options alone, where there are several.

    >>> families(["source", "pseudo:n0=4", "ema", "pseudo"])
    [['pseudo:n0=4', 'pseudo']]
    """
    by_name: dict[str, list[str]] = {}
    for text in texts:
        by_name.setdefault(text.split(":")[0], []).append(text)
    return [variants for variants in by_name.values() if len(variants) > 1]


def winners(contested: Sequence[Sequence[str]], scored: Results) -> list[str]:
    """Of each family the one with the best mean accuracy over users, streams, starts and seeds; ties: the first."""

    def mean(text: str) -> float:
        right = [
            t.correct[t.scored].mean() for cell, (traces, _) in scored.items() if cell.rule == text for t in traces
        ]
        return float(sum(right) / len(right))

    return [max(variants, key=mean) for variants in contested]


def check_same_windows(results: Results) -> None:
    """Raise unless every rule met the very same windows."""
    met: dict[tuple[int, UserGroup, str], list[str]] = {}
    for cell, (traces, _) in results.items():
        digests = [t.digest for t in traces]
        if met.setdefault((cell.run.seed, cell.users, cell.stream), digests) != digests:
            raise ValueError(f"{cell.rule} on {cell.stream} met other windows than the rules before it")


def study_from(values: dict[str, Any], **plan: Any) -> Study:
    """A study from plain values; the plan starts from the scenario's own."""
    return Study(**values, plan=plan_for(values["scenario"], **plan))

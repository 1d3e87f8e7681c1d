"""Online adaptation of unseen users: all rules follow the same streams.

A *cell* is one rule with one start on one kind of stream, for all users of one seed. Each cell is written when it is
finished, as a table of windows; an interrupted study resumes with the missing cells. All measures are computed from
these tables.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from fedbn.augment.base import augmentation_text
from fedbn.config import Conditions, nest, seed_numbers
from fedbn.errors import UserError
from fedbn.federation.run import Run, plan_for, task_of
from fedbn.files import locked
from fedbn.objects import split_options
from fedbn.online.alignments.base import parse_alignment
from fedbn.online.rules.source import Source
from fedbn.online.traces import Trace
from fedbn.plugins import build, render, table
from fedbn.streams import Stream, stream
from fedbn.tta import Adapter, Method
from fedbn_simulations.adaptation.cells import SOURCE, Cell, bounds_of, stored_cell
from fedbn_simulations.adaptation.check import AUGMENTED, AUTO, Decision, candidates, choose_augmented, decide
from fedbn_simulations.adaptation.methods import AdaptationMethod, adaptation_method, can_align, check_classes
from fedbn_simulations.adaptation.metric import StudyMetric
from fedbn_simulations.adaptation.options import StudyOptions
from fedbn_simulations.adaptation.source_model import SourceModel, UserGroup, train_source_model, untrained_source_model
from fedbn_simulations.adaptation.warm_starts import start
from fedbn_simulations.engines.execute import Engine
from fedbn_simulations.experiments.tasks import Report


@dataclass(frozen=True)
class Study(StudyOptions):
    """Online adaptation of unseen users: strategies of training, rules, streams, starts and seeds.

    Raises:
        UserError: a value is out of bounds.
    """

    @staticmethod
    def from_dict(values: dict[str, Any]) -> Study:
        """Build a study from parsed JSON or TOML, or from flat options; as `Experiment.from_dict`.

        Raises:
            UserError: no scenario, an unknown option, or a value of the wrong type.
        """
        values = nest(Study, values)
        if "scenario" not in values:
            raise UserError("no scenario given: see `fedbn list scenarios`")
        plan = plan_for(str(values["scenario"]), **table(values.pop("plan", {}), "plan"))
        return replace(build(Study, values, "study"), plan=plan)

    def resolved(self) -> Study:
        """The study with all texts checked and in their shortest form, and the source as first rule.

        Raises:
            UserError: an unknown name or option, a duplicate, an empty list, or something that needs classes for a task
                without them.
        """
        if not self.strategies:
            raise UserError("no strategies given: name at least one of --strategies")
        runs = [self.run(0, strategy).resolved() for strategy in self.strategies]
        rules = [text for r in self.rules if (text := rule_text(r)) not in (SOURCE, AUGMENTED)]
        aligned = [
            adaptation_method(text).text
            for align in (render(parse_alignment(a)) for a in self.align)
            for text in (align, *(f"{align}+{r}" for r in named_rules(rules) if can_align(r)))
        ]
        task = task_of(self)
        StudyMetric.of(task, self.metric)
        methods = map(adaptation_method, named_rules((*rules, *aligned)))
        check_classes(task, methods, map(start, self.starts), map(stream, self.streams))
        found: dict[str, Any] = {
            "strategies": tuple(run.strategy for run in runs),
            "rules": (SOURCE, *rules, *aligned, *([AUGMENTED] if self.augments else [])),
            "streams": tuple(render(stream(s)) for s in self.streams),
            "starts": tuple(render(start(s)) for s in self.starts),
        }
        for kind, names in found.items():
            if not names:
                raise UserError(f"no {kind} given: name at least one of --{kind}")
            if twice := {n for n in names if names.count(n) > 1}:
                raise UserError(f"{kind} given twice: {', '.join(sorted(twice))}")
        texts = {
            k: getattr(runs[0], k)
            for k in ("scenario", "model", "task", "partition", "shift", "privacy", "head", "private")
        }
        return replace(self, align=(), augments=tuple(map(augmentation_text, self.augments)), **texts, **found)

    def run(self, seed: int, strategy: str) -> Run:
        """The training run of a seed and strategy."""
        return Run(strategy=strategy, seed=seed, **{f.name: getattr(self, f.name) for f in fields(Conditions)})

    def runs(self) -> list[Run]:
        """All training runs, seeds outermost."""
        return [self.run(seed, strategy) for seed in seed_numbers(self.seeds) for strategy in self.strategies]


CHOSEN = (AUTO, AUGMENTED)
"""Rows that a study itself chooses, on seen users."""


def rule_text(text: str) -> str:
    """The shortest text of a rule or method; rows that a study itself chooses stay as they are."""
    return text if text in CHOSEN else adaptation_method(text).text


def named_rules(texts: Sequence[str]) -> list[str]:
    """The rules other than those that a study itself chooses."""
    return [text for text in texts if text not in CHOSEN]


def cells_of(study: Study, users: UserGroup, rules_: Sequence[str]) -> list[Cell]:
    """All cells of one group of users; oracles and the cold source first."""
    return [
        cell
        for run in study.runs()
        for kind in study.streams
        for cell in (
            *(Cell(run, users, kind, "cold", bound) for bound in (*bounds_of(task_of(study)), SOURCE)),
            *(
                Cell(run, users, kind, begin, text)
                for begin in study.starts
                for text in rules_
                if (begin, text) != ("cold", SOURCE)
            ),
        )
    ]


Done = Callable[[Cell], None]
CHECKED_WINDOWS = 8
"""Source windows with which methods are started once before training, to find models that they do not support."""

CellResult = tuple[list[Trace], dict[str, Any]]

Results = dict[Cell, CellResult]

Decisions = dict[Run, Decision]
"""What ``auto`` chose for each training run."""


def run_study(
    study: Study,
    out: Path,
    *,
    engine: Engine = "grid:stacked",
    report: Report = lambda event: None,
    began: Callable[[Sequence[Cell]], None] = lambda cells: None,
    done: Done = lambda cell: None,
    checked: Callable[[Run], None] = lambda run: None,
) -> tuple[Study, Results, Decisions]:
    """Run a study, or resume it.

    Args:
        study: the study.
        out: directory of results; finished cells are not run again.
        engine: engine of the training runs.
        report: called after each round of training.
        began: called with all cells before they run.
        done: called after each cell.
        checked: called after the check of each run for ``auto``.

    Returns:
        The study with the selected rules, its cells, and what ``auto`` chose for each run.

    Raises:
        UserError: before anything runs, for whatever can be checked then.
    """
    study = study.resolved()
    named = [adaptation_method(text) for text in named_rules(study.rules)]
    methods = [method.rule for method in named if isinstance(method.rule, Method)]
    for run in study.runs():
        untrained = untrained_source_model(run)
        streams = [s for text in study.streams for s in untrained.streams(text, "unseen")]
        for method in named:
            untrained.sums_for(method)
        possible = candidates(untrained) if AUTO in study.rules else ()
        check_windows(untrained, [*named, *map(adaptation_method, possible)], streams)
        for adapting in methods:
            Adapter(adapting, untrained.model, untrained.source_windows[:CHECKED_WINDOWS])
    with locked(out):
        return _run_study(study, out, engine, report, began, done, checked)


def _run_study(
    study: Study,
    out: Path,
    engine: Engine,
    report: Report,
    began: Callable[[Sequence[Cell]], None],
    done: Done,
    checked: Callable[[Run], None],
) -> tuple[Study, Results, Decisions]:
    def train(run: Run) -> SourceModel:
        """Train a network that only a choice needs; trackers do not know its run."""
        return train_source_model(run, out, engine, lambda event: None)

    def follow(cell: Cell, source: SourceModel) -> CellResult:
        return stored_cell(out, cell, source)

    sources = {run: train_source_model(run, out, engine, report) for run in study.runs()}

    def run_cells(cells: list[Cell]) -> Results:
        began(cells)
        results: Results = {}
        for cell in cells:
            source = sources[cell.run]
            actual = cell
            if cell.rule == AUTO:
                actual = replace(cell, rule=decisions[cell.run].chosen)
            elif cell.rule == AUGMENTED:
                source = augmented[cell.run]
                actual = replace(cell, run=source.run, rule=SOURCE)
            traces, facts = follow(actual, source)
            results[cell] = traces, facts | {"augment": actual.run.plan.augment}
            done(cell)
        return results

    decisions: Decisions = {}
    augmented: dict[Run, SourceModel] = {}
    metric = StudyMetric.of(task_of(study), study.metric)
    if study.tune and (rival_families := families(study.rules)):
        rivals = [text for variants in rival_families for text in variants]
        scored = run_cells([c for c in cells_of(study, "seen", rivals) if c.rule in rivals])
        losers = set(rivals) - set(winners(rival_families, scored))
        study = replace(study, rules=tuple(r for r in study.rules if r not in losers))
    if AUTO in study.rules or study.check_rules:
        extra = checkable(study.rules) if study.check_rules else ()
        for run, source in sources.items():
            decisions[run] = decide(source, study.check, metric, follow, train, extra)
            checked(run)
    if AUGMENTED in study.rules:
        for run, source in sources.items():
            augmented[run] = train(choose_augmented(source, study.augments, metric, train, follow))
    results = run_cells(cells_of(study, "unseen", study.rules))
    check_same_windows(results)
    return study, results, decisions


def check_windows(source: SourceModel, methods: Sequence[AdaptationMethod], streams: Sequence[Stream]) -> None:
    """Check that the alignments of methods can use all windows of streams.

    Raises:
        UserError: the windows of a user have another unit than those of the seen users.
    """
    for align in dict.fromkeys(method.align for method in methods if method.align):
        aligner, _ = source.sums_for(AdaptationMethod(Source(), align=align))
        assert aligner is not None
        for s in streams:
            try:
                aligner.measure(s.x)
            except UserError as error:
                raise UserError(f"user {s.user!r}: {error}") from None


def checkable(texts: Sequence[str]) -> list[str]:
    """The named rules that a check on seen users can evaluate: all that ask no questions.

    >>> checkable(["source", "auto", "ema", "ema/ask"])
    ['ema']
    """
    return [text for text in named_rules(texts) if text != SOURCE and adaptation_method(text).ask is None]


def families(texts: Sequence[str]) -> list[list[str]]:
    """Groups of rules that differ only in their options.

    >>> families(["source", "pseudo:n0=4", "ema", "pseudo"])
    [['pseudo:n0=4', 'pseudo']]
    >>> families(["rotation:b=4", "rotation:b=4+ema", "rotation", "ema+matched"])
    [['rotation:b=4', 'rotation']]
    """
    by_name: dict[str, list[str]] = {}
    for text in texts:
        by_name.setdefault("+".join(split_options(part)[0] for part in text.split("+")), []).append(text)
    return [variants for variants in by_name.values() if len(variants) > 1]


def winners(rival_families: Sequence[Sequence[str]], scored: Results) -> list[str]:
    """The best rule of each family, by the mean over users, streams, starts and seeds of a stream's mean value.

    Values are those of `fedbn.online.traces.Trace`. The first of ties.
    """

    def mean(text: str) -> float:
        found = [
            t.values[t.scored].mean() * (1 if t.higher_is_better else -1)
            for cell, (traces, _) in scored.items()
            if cell.rule == text
            for t in traces
        ]
        return float(sum(found) / len(found))

    return [max(variants, key=mean) for variants in rival_families]


def check_same_windows(results: Results) -> None:
    """Check that all rules saw the same windows."""
    known: dict[tuple[int, UserGroup, str], list[str]] = {}
    for cell, (traces, _) in results.items():
        digests = [t.digest for t in traces]
        if known.setdefault((cell.run.seed, cell.users, cell.stream), digests) != digests:
            raise ValueError(f"{cell.rule} on {cell.stream} saw other windows than the rules before it")

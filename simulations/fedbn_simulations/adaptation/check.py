"""``auto``: the federation's own evidence decides which rule follows new users.

Seen users are divided into folds. Each fold's users follow every candidate over their later recordings in recorded
order, as new users would: they are in none of the sums behind the candidate (population prior, alignment).

Seen users are those whose sensors the network knows, and a candidate is there for those whose sensors it does not know.
If the data name the axes of sensors, the folds therefore follow the candidates a second time, with each user's device
turned by `WORN` about a random axis. A candidate is used only if two lower confidence bounds over users allow it: the
mean gain over both conditions is above zero (it helps), and the mean gain in recorded order is above minus a margin (it
does no harm where there is nothing to correct; a non-inferiority test). Otherwise the source model is used.

The network is another matter. ``check=seen`` evaluates the federation's network, which was trained on these users and
whose running statistics include theirs. It costs one round without training. On familiar users the source model makes
fewer errors, so there is less to gain than for new users. ``check=held-out`` trains one more network per fold, without
its users, so that nothing at all is known of them, at the cost of as many trainings as folds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from fedbn.data.population import Population
from fedbn.errors import UserError
from fedbn.federation.run import Run, task_of
from fedbn.online.alignments.base import alignments
from fedbn.online.matched import Matched
from fedbn.online.prequential_metrics import harm_limits, harmed, scores
from fedbn.online.rules.base import Rule
from fedbn.online.traces import Trace
from fedbn.plugins import render
from fedbn.scenarios.base import scenario_text
from fedbn.streams import stream
from fedbn.tasks import Task, render_task
from fedbn_simulations.adaptation.cells import SOURCE, Cell, stored_cell
from fedbn_simulations.adaptation.methods import adaptation_method, check_classes
from fedbn_simulations.adaptation.metric import StudyMetric
from fedbn_simulations.adaptation.options import CheckKind
from fedbn_simulations.adaptation.source_model import SourceModel
from fedbn_simulations.results.formatting import format_signed

AUTO = "auto"
"""The rule that the federation chooses."""

AUGMENTED = "augmented"
"""The source model that is trained with augmentation, as a row of a study."""

RULES = ("population:diversity=1", "population")
"""Rules that are candidates, the first that the task allows."""

HEADS = (Matched.name,)
"""Heads that can follow a rule."""

FALLBACK = "fallback"
"""Monitor of every candidate with an alignment."""

FOLDS = 4
"""Folds of seen users."""

FEWEST = 4
"""Seen users without whom there is no check: an interval over fewer says nothing."""

LEVEL = 0.95
"""Confidence of the lower bounds, of all candidates together (Bonferroni)."""

RESAMPLES = 10_000

RECORDED = "natural"
"""Stream of the check: recorded order."""

WORN = "turned:at=0.0:degrees=45.0"
"""Second stream of the check, for sensors with axes: the device is worn differently during the whole recording."""

MARGIN = 2.0
"""Largest mean loss in recorded order, in units of the loss from which a user is harmed: 2 points of accuracy."""

Follow = Callable[[Cell, SourceModel], tuple[list[Trace], dict[str, Any]]]
"""Runs a cell, or reads it."""

Train = Callable[[Run], SourceModel]
"""Trains the source model of a run, or reads it."""


@dataclass(frozen=True)
class Gain:
    """Gain of a candidate over the source on seen users.

    Attributes:
        rule: text of the candidate.
        value: mean over users and conditions of the difference of the metric, positive where it is better.
        low: lower confidence bound of this mean.
        recorded: mean over users in recorded order only.
        recorded_low: lower confidence bound of this mean.
        harmed: share of users whose metric in recorded order is worse than the source's by more than a point.
        margin: largest mean loss in recorded order.
    """

    rule: str
    value: float
    low: float
    recorded: float
    recorded_low: float
    harmed: float
    margin: float

    @property
    def supported(self) -> bool:
        """Whether it helps, and does no harm in recorded order."""
        return self.low > 0 and self.recorded_low > -self.margin


@dataclass(frozen=True)
class Decision:
    """What the federation decided for a run, and why.

    Attributes:
        chosen: text of the rule.
        reason: one sentence.
        gains: candidates, and other rules that were checked for a warning.
        users: number of seen users.
        where: the recordings of the check, in words.
        windows: windows that all of them evaluated, over all candidates and the source.
        bytes_per_user: bytes that a client receives (priors) and sends (its scores) for the check.
        trainings: networks trained for the check.
    """

    chosen: str
    reason: str
    gains: tuple[Gain, ...]
    users: int
    where: str = ""
    windows: int = 0
    bytes_per_user: int = 0
    trainings: int = 0

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


def candidates(source: SourceModel) -> tuple[str, ...]:
    """Texts of all candidates that fit a scenario: alignments, the first possible rule, heads, and combinations.

    The list depends on the kind of data only, not on any result.
    """
    task = source.ctx.task
    aligned = ["", *alignments()]
    rules = ["", *[rule for rule in RULES if _fits(source, task, rule)][:1]]
    found = []
    for align in aligned:
        for rule in rules:
            for head in ("", *HEADS):
                text = "+".join(filter(None, (align, rule, head)))
                if text and _fits(source, task, text):
                    found.append(adaptation_method(f"{text}/{FALLBACK}" if align else text).text)
    return tuple(found)


def _fits(source: SourceModel, task: Task, text: str) -> bool:
    """Whether a method can run on the data of a scenario."""
    try:
        method = adaptation_method(text)
        check_classes(task, [method], [], [])
        source.sums_for(method)
        if isinstance(method.rule, Rule):
            source.prior_for(method.rule)
    except UserError:
        return False
    return True


def fold_populations(population: Population, folds: int = FOLDS) -> list[Population]:
    """The seen users, with one fold of them unseen in each population.

    Folds are contiguous, so that successive clients of one person are mostly in the same fold.
    """
    users = tuple(population.users[i] for i in population.seen)
    parts = np.array_split(np.arange(len(users)), min(folds, len(users) // 2))
    return [replace(population, users=users, unseen=tuple(part.tolist()), held_out=None) for part in parts]


def fold_sources(source: SourceModel, kind: CheckKind, train: Train) -> Iterator[tuple[Run, str, SourceModel]]:
    """Run, name and source model of each fold, whose users are unseen.

    Args:
        source: the source model, trained on all seen users.
        kind: whether its network is checked, or one that was trained without the fold.
        train: trains the source model of a run.
    """
    populations = fold_populations(source.ctx.population)
    for k, population in enumerate(populations):
        if kind == "seen":
            model = SourceModel(source.run, source.model, replace(source.ctx, population=population))
            yield source.run, f"{k + 1} of {len(populations)}", model
        else:
            run = replace(
                source.run,
                scenario=scenario_text(population),
                task=render_task(task_of(source.run)),
                partition="natural",
                shift="",
            )
            yield run, "", train(run)


def decide(
    source: SourceModel,
    kind: CheckKind,
    metric: StudyMetric,
    follow: Follow,
    train: Train,
    named: Sequence[str] = (),
) -> Decision:
    """Check all candidates on seen users, and choose one or the source.

    Args:
        source: the source model.
        kind: as in `fold_sources`.
        metric: the metric of the gains.
        follow: runs a cell.
        train: trains a source model.
        named: rules that are checked, too, but cannot be chosen.
    """
    seen = len(source.ctx.population.seen)
    if seen < FEWEST:
        return Decision(SOURCE, f"auto uses the source: {seen} seen users are too few for a check.", (), seen)
    listed = candidates(source)
    texts = [*listed, *(text for text in named if text not in listed)]
    conditions = check_streams(source)
    values: dict[tuple[str, str], list[float]] = {(text, kind): [] for text in (SOURCE, *texts) for kind in conditions}
    windows, size, trainings = 0, 0, 0
    for run, fold, model in fold_sources(source, kind, train):
        trainings += kind == "held-out"
        size = max(size, _prior_bytes(model, listed))
        for (text, order), found in values.items():
            traces, _ = follow(Cell(run, "unseen", order, "cold", text, fold), model)
            found += [scores(t, source.ctx.task)[metric.name] for t in traces]
            windows += sum(map(len, traces))
    sign = 1 if metric.higher_is_better else -1
    base = np.array([values[SOURCE, order] for order in conditions])
    margin = MARGIN * float(np.mean(harm_limits(base[0], metric.is_share)))
    level = 1 - (1 - LEVEL) / max(1, len(listed))
    found_gains = []
    for text in texts:
        adapted = np.array([values[text, order] for order in conditions])
        gains = sign * (adapted - base)
        both, recorded = gains.mean(0), gains[0]
        worse = harmed(adapted[0], base[0], metric.higher_is_better, metric.is_share)
        bounds = lower_bound(both, level), lower_bound(recorded, level)
        found_gains.append(Gain(text, float(both.mean()), bounds[0], float(recorded.mean()), bounds[1], worse, margin))
    where = f"later recordings{', as recorded and turned,' if len(conditions) > 1 else ''} of {seen} seen users"
    chosen, reason = _choose([g for g in found_gains if g.rule in listed], where)
    return Decision(chosen, reason, tuple(found_gains), seen, where, windows, size + 8 * len(values), trainings)


def check_streams(source: SourceModel) -> tuple[str, ...]:
    """Streams of the check: recorded order and, if the data name the axes of sensors, another placement."""
    try:
        stream(WORN).make_all(["user"], [source.ctx.population.users[0].test], 0)
    except UserError:
        return (RECORDED,)
    return (RECORDED, WORN) if source.ctx.population.triples else (RECORDED,)


def number_of_cells(source: SourceModel) -> int:
    """Number of cells that `decide` follows with the check ``seen``, to show progress."""
    if len(source.ctx.population.seen) < FEWEST:
        return 0
    rules = 1 + len(candidates(source))
    return len(fold_populations(source.ctx.population)) * rules * len(check_streams(source))


def decide_stored(source: SourceModel, out: Path, done: Callable[[Cell], None] = lambda cell: None) -> Decision:
    """Choose a rule for the users of a service, with the check ``seen``; finished cells in ``out`` are read."""

    def follow(cell: Cell, model: SourceModel) -> tuple[list[Trace], dict[str, Any]]:
        found = stored_cell(out, cell, model)
        done(cell)
        return found

    return decide(source, "seen", StudyMetric.of(source.ctx.task), follow, lambda run: source)


def choose_augmented(
    source: SourceModel, texts: Sequence[str], metric: StudyMetric, train: Train, follow: Follow
) -> Run:
    """The training run with the augmentation that is best on later recordings of seen users; the first of ties.

    Args:
        source: the source model, trained without.
        texts: augmentations.
        metric: the metric, averaged over users.
        train: trains a source model.
        follow: runs a cell.
    """
    sign = 1 if metric.higher_is_better else -1

    def value(run: Run) -> float:
        traces, _ = follow(Cell(run, "seen", "natural", "cold", SOURCE), train(run))
        return sign * float(np.mean([scores(t, source.ctx.task)[metric.name] for t in traces]))

    return max((replace(source.run, plan=replace(source.run.plan, augment=text)) for text in texts), key=value)


def lower_bound(gains: np.ndarray, level: float) -> float:
    """Lower confidence bound of the mean gain over users ``[n]``: percentile bootstrap, one-sided.

    >>> lower_bound(np.full(9, 0.1), 0.95).__round__(6), lower_bound(np.array([0.5, -0.1, -0.1, -0.1]), 0.95) < 0
    (0.1, True)
    """
    draw = np.random.default_rng(0)
    means = gains[draw.integers(len(gains), size=(RESAMPLES, len(gains)))].mean(1)
    return float(np.quantile(means, 1 - level))


def _choose(gains: Sequence[Gain], where: str) -> tuple[str, str]:
    """The supported candidate with the largest lower bound, or the source; and one sentence."""
    if not gains:
        return SOURCE, "auto uses the source: no alignment or rule fits these data."
    supported = [g for g in gains if g.supported]
    best = max(supported or gains, key=lambda g: g.low)
    figures = _figures(best, where)
    if supported:
        return best.rule, f"auto uses {best.rule}, with the largest lower bound of {len(gains)} candidates: {figures}."
    return SOURCE, f"auto uses the source: no gain of {len(gains)} candidates is certain; best {best.rule}, {figures}."


def _figures(gain: Gain, where: str) -> str:
    """Mean and lower bound over all conditions and, if they differ, in recorded order."""
    text = f"{format_signed(gain.value)} (lower bound {format_signed(gain.low)}) on {where}"
    if gain.recorded == gain.value:
        return text
    return f"{text}, {format_signed(gain.recorded)} ({format_signed(gain.recorded_low)}) as recorded"


def _prior_bytes(model: SourceModel, texts: Sequence[str]) -> int:
    """Bytes of the priors of rules and alignments that a client needs to follow all candidates, each once."""
    methods = [adaptation_method(text) for text in texts]
    rules = {method.rule for method in methods if isinstance(method.rule, Rule) and method.rule.requires}
    aligned: dict[str, Any] = {}
    for method in methods:
        aligner, head = model.sums_for(method)
        aligned |= {} if aligner is None else {render(aligner.alignment): aligner.prior}
        aligned |= {} if head is None else {render(head.options): head}
    parts: list[Any] = [prior for rule in rules for prior in model.prior_for(rule).values()]
    parts += aligned.values()
    tensors = [getattr(part, f.name) for part in parts for f in fields(part)]
    return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, Tensor))


def warnings(decision: Decision, named: Sequence[str]) -> list[str]:
    """One sentence for each named rule that was checked and that the check does not support."""
    found: Mapping[str, Gain] = {_without_fallback(g.rule): g for g in decision.gains}
    return [
        f"{text} is not supported by the federation's own check: {_figures(g, decision.where)}, {g.harmed:.0%} harmed"
        for text in named
        if (g := found.get(_without_fallback(text))) is not None and not g.supported
    ]


def _without_fallback(text: str) -> str:
    return text.removesuffix(f"/{FALLBACK}")

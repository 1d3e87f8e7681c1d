"""Personalise: a federated model meets people it has never seen, and every rule follows the same streams of theirs.

A *cell* is one rule with one start on one kind of stream, for all people of one seed side by side. Each is written
when it is done, as a table of windows; an interrupted study goes on with the cells that are missing. All measures are
computed from these tables, none is stored first.
"""

from __future__ import annotations

import copy
import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

import pandas as pd
import torch
from torch import Tensor, nn

from fedbn.drift import Action, Detector, Watched, action, detector
from fedbn.errors import UserError
from fedbn.layers import require_statistics
from fedbn.online import LayerPrior, Rule, personalize, population_prior, source_prior
from fedbn.online.alpha import learn_alpha
from fedbn.online.prior import layer_priors
from fedbn.online.rule import rules
from fedbn.online.rules.source import Source
from fedbn.prequential import (
    Ask,
    Trace,
    accuracy_with_state,
    balanced,
    balanced_oracle,
    follow,
    follow_blocks,
    judge_alarms,
    own_stream_oracle,
)
from fedbn.run import Plan, Run, plan_for
from fedbn.scenario import Examples, User
from fedbn.seeds import generator
from fedbn.setting import Setting, setting
from fedbn.spec import parse, render
from fedbn.streams import Stream, stream
from fedbn.training import logits
from fedbn.tta import Adapter, Method, methods
from simulations.compare import CHECKPOINT, Report, Task, perform
from simulations.engines import Engine
from simulations.store import code_digest, load_outcome, write_atomically

SOURCE = "source"
"""The rule that never moves: what every other is measured against."""

SOURCE_WINDOWS = 512
"""Windows of seen users' training data that methods may look at before they begin (EATA's Fisher information)."""

CHANGES = ("switch", "fault", "repair")
"""Events that a drift detector should notice; after a gap nothing needs to be different."""

People = Literal["unseen", "seen"]


# ---------------------------------------------------------------- starts


@dataclass(frozen=True)
class Start(ABC):
    """What a person gives before the stream begins, from an earlier recording; subclasses below.

    Attributes:
        name: what the command line calls it.
        about: one line for lists.
        n0: windows of the statistics before that the calibration is merged with. A placement changes between
            recordings, so many where the windows are many.
    """

    name: ClassVar[str]
    about: ClassVar[str]
    n0: float = 2.0

    def __post_init__(self) -> None:
        if self.n0 < 0:
            raise UserError(f"start {self.name!r}: n0 must be at least 0, not {self.n0:g}")

    @abstractmethod
    def windows(self, earlier: Examples, draw: torch.Generator) -> Tensor | None:
        """Windows ``[n, *shape]`` to calibrate by; None for nothing."""


@dataclass(frozen=True)
class Cold(Start):
    """The source's statistics."""

    name = "cold"
    about = "nothing: the source's statistics"

    def windows(self, earlier: Examples, draw: torch.Generator) -> Tensor | None:
        return None


@dataclass(frozen=True)
class Recording(Start):
    """The whole earlier recording, without labels."""

    name = "recording"
    about = "the person's earlier recording, unlabelled"

    def windows(self, earlier: Examples, draw: torch.Generator) -> Tensor | None:
        return earlier.x


@dataclass(frozen=True)
class Classes(Start):
    """Guided calibration: as many windows of each class; the label is used to choose them and for nothing else.

    Attributes:
        k: windows of each class, or as many as the rarest has.
    """

    name = "classes"
    about = "k windows of each class from the earlier recording"
    k: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.k < 1:
            raise UserError(f"start 'classes': k must be at least 1, not {self.k}")

    def windows(self, earlier: Examples, draw: torch.Generator) -> Tensor | None:
        return earlier.x[balanced(earlier.y, draw, self.k)]


def start(text: str) -> Start:
    """The start that a text such as ``cold`` or ``classes:k=1`` names.

    Raises:
        UserError: unknown name or option, or an option out of range.
    """
    kinds: tuple[type[Start], ...] = (Cold, Recording, Classes)
    return parse(text, "start", {k.name: k for k in kinds})


# ---------------------------------------------------------------- the study


@dataclass(frozen=True)
class Questions:
    """Ask each user about single windows (`fedbn.prequential.Ask`).

    Attributes:
        budget: questions a user answers.
    """

    name: ClassVar[str] = "ask"
    about: ClassVar[str] = "ask for the label of a class that was confirmed least"
    budget: int = 6

    def __post_init__(self) -> None:
        if self.budget < 1:
            raise UserError(f"'ask': budget must be at least 1, not {self.budget}")


@dataclass(frozen=True)
class Contender:
    """What follows the streams: a rule or method and, with a rule, drift detection and questions.

    Attributes:
        rule: on statistics, or a method with gradients or output smoothing.
        watch: what notices drift, and what is done then.
        ask: how many questions users answer.
    """

    rule: Rule | Method
    watch: tuple[Detector, Action] | None = None
    ask: Questions | None = None

    @property
    def text(self) -> str:
        """The shortest text that `contender` reads as this."""
        return "/".join(render(part) for part in (self.rule, *(self.watch or ()), self.ask) if part is not None)


def contender(text: str) -> Contender:
    """A contender from ``rule``, ``rule/detector/action``, ``rule/ask`` or ``rule/detector/action/ask``.

    Raises:
        UserError: an unknown name, a wrong option, parts that do not go together.

    >>> contender("pseudo:n0=16/adwin/decay:n=8/ask").text
    'pseudo/adwin/decay:n=8/ask'
    """
    first, *more = text.split("/")
    known: dict[str, type[Rule | Method]] = {**rules(), **methods()}
    chosen = parse(first, "rule or method", known)
    ask = parse(more.pop(), "question", {Questions.name: Questions}) if more and more[-1].startswith("ask") else None
    if len(more) not in (0, 2):
        raise UserError(f"{text!r}: write rule/detector/action, e.g. {first}/adwin/decay, or {first}/ask")
    watch = (detector(more[0]), action(more[1])) if more else None
    if isinstance(chosen, Method) and (watch or ask):
        raise UserError(
            f"{text!r}: only rules on statistics can be watched or ask; {chosen.name} is a method of its own"
        )
    return Contender(chosen, watch, ask)


@dataclass(frozen=True)
class Study:
    """What is compared.

    Attributes:
        scenario, strategy, model, partition, shift, device, plan: of the federated training, as in `Run`.
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
    strategy: str = "global-naive"
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
        run = self.run(0).resolved()
        found: dict[str, Any] = {
            "rules": (SOURCE, *(t for r in self.rules if (t := contender(r).text) != SOURCE)),
            "streams": tuple(render(stream(s)) for s in self.streams),
            "starts": tuple(render(start(s)) for s in self.starts),
        }
        for kind, names in found.items():
            if not names:
                raise UserError(f"no {kind} given: name at least one of --{kind}")
            if twice := {n for n in names if names.count(n) > 1}:
                raise UserError(f"{kind} given twice: {', '.join(sorted(twice))}")
        texts = {k: getattr(run, k) for k in ("scenario", "strategy", "model", "partition", "shift")}
        return replace(self, **texts, **found)

    def run(self, seed: int) -> Run:
        """The training run of one seed."""
        return Run(
            self.scenario, self.strategy, seed, self.model, self.partition, self.shift, self.plan, device=self.device
        )


@dataclass(frozen=True)
class Cell:
    """One rule with one start on one kind of stream, for all people of one seed.

    Attributes:
        run: the training run.
        people: whether the people are unseen, or seen ones with their later recordings (for tuning).
        stream, start, rule: texts; a rule ``bound-own`` or ``bound-balanced`` is an oracle.
    """

    run: Run
    people: People
    stream: str
    start: str
    rule: str

    @property
    def id(self) -> str:
        """A digest of all of it."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:16]


BOUNDS: dict[str, Callable[[nn.Module, Stream, int], Trace]] = {
    "bound-own": lambda model, s, seed: own_stream_oracle(model, s),
    "bound-balanced": balanced_oracle,
}
"""Oracles: statistics of the whole stream, and of equally many of its windows of each class."""


def cells_of(study: Study, people: People, rules_: Sequence[str]) -> list[Cell]:
    """All cells of one kind of people; bounds and the cold source first."""
    return [
        cell
        for seed in range(study.seeds)
        for kind in study.streams
        for cell in (
            *(Cell(study.run(seed), people, kind, "cold", bound) for bound in (*BOUNDS, SOURCE)),
            *(
                Cell(study.run(seed), people, kind, begin, text)
                for begin in study.starts
                for text in rules_
                if (begin, text) != ("cold", SOURCE)
            ),
        )
    ]


# ---------------------------------------------------------------- one seed's people


@dataclass(frozen=True, eq=False)
class Meeting:
    """A trained model and the people it meets.

    Attributes:
        run: how it was trained.
        model: the server's, in evaluation mode.
        here: the run made concrete.
    """

    run: Run
    model: nn.Module
    here: Setting

    def people(self, which: People) -> list[User]:
        """The people of one kind, in the population's order.

        Raises:
            UserError: there are none.
        """
        population = self.here.population
        found = [population.users[i] for i in (population.unseen if which == "unseen" else population.seen)]
        if not found:
            raise UserError(
                f"scenario {self.run.scenario!r} holds out nobody, so there is nobody new to personalise for: give it "
                "unseen users, e.g. SCENARIO:unseen=2"
            )
        return found

    def streams(self, text: str, which: People) -> list[Stream]:
        """Everybody's stream over their later recordings."""
        people = self.people(which)
        return stream(text).of([u.name for u in people], [u.test for u in people], self.run.seed)

    @cached_property
    def source_windows(self) -> Tensor:
        """Unlabelled windows of seen users' training data, an equal share from each."""
        seen = [self.here.population.users[i].train.x for i in self.here.population.seen]
        share = max(2, SOURCE_WINDOWS // len(seen))
        draw = generator(self.run.seed, "source windows")
        return torch.cat([x[torch.randperm(len(x), generator=draw)[:share]] for x in seen])

    @cached_property
    def prior(self) -> dict[str, LayerPrior]:
        """The model's statistics, and for rules that ask for them those of each class over seen users' training data.

        They are sums over users, so a federation can pool them without seeing a window.
        """
        data = self.here.gathered
        return source_prior(self.model, data.x, data.y, len(self.here.population.classes))

    @cached_property
    def population(self) -> dict[str, LayerPrior]:
        """How seen users' statistics are and differ under the finished model; sums over users too."""
        return population_prior(self.model, [self.here.population.users[i].train.x for i in self.here.population.seen])

    @cached_property
    def weighed(self) -> dict[str, LayerPrior]:
        """The weights of `ttn`, learnt from a batch of each seen user."""
        seen = [self.here.population.users[i].train for i in self.here.population.seen]
        draw = generator(self.run.seed, "ttn")
        rows = self.run.plan.batch_size
        chosen = [u.take(torch.randperm(len(u), generator=draw)[:rows]) for u in seen]
        return learn_alpha(self.model, [(c.x, c.y) for c in chosen], draw)

    def prior_for(self, chosen: Rule) -> dict[str, LayerPrior]:
        """What users start from under a rule, and what it may know."""
        match chosen.wants:
            case "n0":
                return self.population
            case "class_mean":
                return self.prior
            case "alpha":
                return self.weighed
            case _:
                return layer_priors(self.model)

    @cached_property
    def source_test(self) -> Examples:
        """Labelled later windows of seen users, on which forgetting is measured."""
        return self.here.everyone


def meet(run: Run, out: Path, engine: Engine, report: Report) -> Meeting:
    """Train the model of a run, or read it if it is there.

    Raises:
        UserError: the strategy shares no model, or the model has no statistics to follow.
    """
    task = Task(run, str(out / "runs" / run.id))
    perform(task, engine, report)
    here = setting(run)
    outcome = load_outcome(Path(task.directory) / CHECKPOINT, run, here.population.sources)
    if str(here.ownership.owners["body"]) != "shared":  # type: ignore[index]
        raise UserError(f"strategy {run.strategy!r} shares no model that new people could start from: choose another")
    model = copy.deepcopy(here.load(here.assemble(outcome.server.serving, None))).eval()
    require_statistics(model, "personalisation")
    return Meeting(run, model, here)


def conduct_cell(cell: Cell, meeting: Meeting) -> tuple[list[Trace], dict[str, Any]]:
    """All people's traces in one cell, and what else is known of it."""
    seed = cell.run.seed
    followed = meeting.streams(cell.stream, cell.people)
    facts: dict[str, Any] = {"bytes_per_user": None, "forgotten": None, "reset_exact": None, "peeks": False}
    if cell.rule in BOUNDS:
        return [BOUNDS[cell.rule](meeting.model, s, seed) for s in followed], facts | {"peeks": True}
    begin = start(cell.start)
    given = {
        u.name: begin.windows(u.train, generator(seed, "start", cell.start, u.name))
        for u in meeting.people(cell.people)
    }
    chosen = contender(cell.rule)
    if isinstance(chosen.rule, Method):
        return _follow_each(chosen.rule, meeting, followed, given, begin.n0, seed), facts | {"peeks": chosen.rule.peeks}
    prior = meeting.prior_for(chosen.rule)
    net = personalize(meeting.model, chosen.rule, prior=prior)
    for name, windows in given.items():
        if windows is not None:
            net.calibrate(windows, user=name, then="freeze" if cell.rule == SOURCE else "adapt", n0=begin.n0)
    follower = Watched(net, meeting.model, *chosen.watch) if chosen.watch else net
    ask = Ask(chosen.ask.budget) if chosen.ask else None
    traces = follow(follower, followed, ask)
    facts["peeks"] = chosen.rule.peeks
    if isinstance(follower, Watched):
        facts["alarms"] = [_alarms(follower.watches[s.user].alarms, s) for s in followed]
    if ask is not None:
        facts["questions"] = {user: sum(counts) for user, counts in ask.confirmed.items()}
    first = followed[0]
    before = float((logits(meeting.model, meeting.source_test.x).argmax(1) == meeting.source_test.y).double().mean())
    after = [accuracy_with_state(net, s.user, meeting.source_test) for s in followed]
    facts["bytes_per_user"] = len(net.state(first.user).to_bytes())
    facts["forgotten"] = before - sum(after) / len(after)
    net.reset(first.user)
    fresh = personalize(meeting.model, chosen.rule, prior=prior).predict(first.x[:1], user=[first.user])
    facts["reset_exact"] = bool(torch.equal(net.predict(first.x[:1], user=[first.user]), fresh))
    return traces, facts


def _alarms(alarms: Sequence[int], met: Stream) -> dict[str, Any]:
    found = judge_alarms(alarms, [e.at for e in met.events if e.kind in CHANGES], len(met))
    return {"delays": found.delays, "missed": found.missed, "false_per_1000": found.false_per_1000}


def _follow_each(
    chosen: Method, meeting: Meeting, followed: Sequence[Stream], given: dict[str, Tensor | None], n0: float, seed: int
) -> list[Trace]:
    traces = []
    for s in followed:
        windows, model = given[s.user], meeting.model
        if windows is not None:
            calibrated = personalize(model, Source(), capacity=1)
            calibrated.calibrate(windows, user=s.user, n0=n0)
            model = calibrated.export(s.user)
        adapter = Adapter(chosen, model, meeting.source_windows, seed)
        traces.append(follow_blocks(adapter, s, chosen.block))
    return traces


# ---------------------------------------------------------------- on disk


def write_cell(out: Path, cell: Cell, traces: Sequence[Trace], facts: dict[str, Any]) -> None:
    """A table of windows, then the facts beside it: a cell with facts is finished."""
    place = out / "cells"
    frame = pd.concat(
        [
            pd.DataFrame(
                {
                    "user": t.user,
                    "window": range(len(t.y)),
                    "y": t.y,
                    "predicted": t.predicted,
                    "confidence": t.confidence,
                    "nll": t.nll,
                    "seconds": t.seconds,
                }
            )
            for t in traces
        ]
    )
    write_atomically(place / f"{cell.id}.parquet", frame.to_parquet(index=False))
    known = {"cell": asdict(cell), "code": code_digest(), "digests": {t.user: t.digest for t in traces}, **facts}
    write_atomically(place / f"{cell.id}.json", json.dumps(known, indent=1).encode())


def read_cell(out: Path, cell: Cell) -> tuple[list[Trace], dict[str, Any]] | None:
    """A finished cell, or None.

    Raises:
        UserError: it was made by other code.
    """
    path = out / "cells" / f"{cell.id}.json"
    if not path.exists():
        return None
    facts = json.loads(path.read_text(encoding="utf-8"))
    if facts["code"] != code_digest():
        raise UserError(
            f"{path} was made by other code (digest {facts['code']}, now {code_digest()}): go back to that version, or "
            "start afresh with another --out; mixing them would not be one study"
        )
    frame = pd.read_parquet(path.with_suffix(".parquet"))
    columns = ("y", "predicted", "confidence", "nll", "seconds")
    traces = [
        Trace(str(user), facts["digests"][user], *(part[c].to_numpy() for c in columns))
        for user, part in frame.groupby("user", sort=False)
    ]
    return traces, facts


Done = Callable[[Cell], None]
Results = dict[Cell, tuple[list[Trace], dict[str, Any]]]


def conduct(
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
    for seed in range(study.seeds):
        setting(study.run(seed))
    meetings = {study.run(s): meet(study.run(s), out, engine, report) for s in range(study.seeds)}
    for text in study.streams:
        for meeting in meetings.values():
            meeting.streams(text, "unseen")

    def all_of(cells: list[Cell]) -> Results:
        began(cells)
        results: Results = {}
        for cell in cells:
            found = read_cell(out, cell)
            if found is None:
                found = conduct_cell(cell, meetings[cell.run])
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
    met: dict[tuple[Run, str], list[str]] = {}
    for cell, (traces, _) in results.items():
        digests = [t.digest for t in traces]
        if met.setdefault((cell.run, cell.stream), digests) != digests:
            raise ValueError(f"{cell.rule} on {cell.stream} met other windows than the rules before it")


def study_from(values: dict[str, Any], **plan: Any) -> Study:
    """A study from plain values; the plan starts from the scenario's own."""
    return Study(**values, plan=plan_for(values["scenario"], **plan))

"""What a person's state gives away, on real people: who it is, and what the last window looked like.

Everybody's earlier and later recording each leave a state (`fedbn.online.state`) behind, made from nothing by the same
rule under the same network, which a federation has trained. *Who is it?* A person is found where the state of the
later recording is nearest to their own of the earlier one, among all people's. *What was the last window?* Two
states one window apart are solved for that window's channel means at the first layer; the error is in units of their
spread over the person's windows, and guessing their mean is the control.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from fedbn.data.population import User
from fedbn.errors import UserError
from fedbn.federation.run import Run
from fedbn.federation.setup import build_context
from fedbn.nn.conversion import require_statistics
from fedbn.online import personalize
from fedbn.online.drift.signal import ChannelMeans
from fedbn.online.prior import layer_priors
from fedbn.online.release import Release, reidentified, window_between
from fedbn.online.state import BNState
from fedbn.seeds import generator
from simulations.engines.execute import execute

RULE = "pseudo"
CLIPPED = "pseudo:clip=3"
"""Noise needs to know how much one window can do."""

CONTROLS: dict[str, tuple[str, Release]] = {
    "none": (RULE, Release(minimum=1)),
    "minimum=50": (RULE, Release(minimum=50)),
    "clip=3": (CLIPPED, Release(minimum=1)),
    "clip=3, noise=1": (CLIPPED, Release(minimum=1, noise=1)),
    "clip=3, noise=10": (CLIPPED, Release(minimum=1, noise=10)),
    "last layer alone": (RULE, Release(minimum=1, last=1)),
}


@dataclass(frozen=True)
class StateLeak:
    """What states give away under one control.

    Attributes:
        control: in words.
        first, last: share of people found by the first or the last layer's statistics; None where it is not released.
        error: of the last window's channel means; None where there is nothing to solve.
        guess: the error of guessing the mean.
        users: whose states are released.
        chance: the share that guessing finds; None where nobody's is.
    """

    control: str
    first: float | None
    last: float | None
    error: float | None
    guess: float
    users: int

    @property
    def chance(self) -> float | None:
        return 1 / self.users if self.users else None


@dataclass(frozen=True)
class Left:
    """What one person leaves behind: states after each recording, and one window before the end of the first."""

    early: BNState
    before: BNState
    late: BNState


def left_by(model: nn.Module, users: Sequence[User], rule: str) -> list[Left]:
    """Everybody's states under a rule."""
    net = personalize(model, rule)
    found = []
    for person in users:
        states = []
        for windows in (person.train.x[:-1], person.train.x[-1:]):
            net(windows, user=person.name)
            states.append(net.state(person.name))
        net.reset(person.name)
        net(person.test.x, user=person.name)
        found.append(Left(states[1], states[0], net.state(person.name)))
    return found


def measure_states(model: nn.Module, users: Sequence[User], seed: int) -> list[StateLeak]:
    """What states give away under each of `CONTROLS`.

    Args:
        model: the trained source.
        users: two at least.
        seed: of the noise.

    Raises:
        UserError: fewer than two people, or a model without statistics.
    """
    require_statistics(model, "leakage of states")
    if len(users) < 2:
        raise UserError("who a state belongs to can be asked of two people at least: choose a scenario with more")
    prior, look = layer_priors(model), ChannelMeans(model, 1)
    first, *_, last = list(prior) * 2
    looks = [look(p.train.x) for p in users]
    guess = _mean_error([(m[:-1].mean(0) - m[-1], m.std(0)) for m in looks])
    out = []
    for name, (rule, release) in CONTROLS.items():
        draw = generator(seed, "release", name)
        told, gaps = [], []
        for own, met in zip(left_by(model, users, rule), looks, strict=True):
            if min(s.n for s in (own.early, own.before, own.late)) < release.minimum:
                continue
            early, before, late = (release.of(s, prior, draw) for s in (own.early, own.before, own.late))
            told.append((early, late))
            if before.n < early.n and early.parts[first][0].n:
                gaps.append((window_between(before, early)[first] - met[-1], met.std(0)))
        shown = {path: bool(told) and bool(told[0][0].parts[path][0].n) for path in (first, last)}
        rates = {
            path: reidentified([e for e, _ in told], [s for _, s in told], path) if shown[path] else None
            for path in shown
        }
        error = _mean_error(gaps) if gaps else None
        out.append(StateLeak(name, rates[first], rates[last], error, guess, len(told)))
    return out


def _mean_error(gaps: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> float:
    return float(torch.stack([(gap.abs() / spread.clamp_min(1e-12)).mean() for gap, spread in gaps]).mean())


def state_leaks(run: Run) -> list[StateLeak]:
    """Train a run's model, and measure what the states of all its people give away.

    Raises:
        UserError: the run cannot work, shares no model, or has too few people.
    """
    run = run.resolved()
    ctx = build_context(run)
    if ctx.treatment.is_local_only:
        raise UserError(f"strategy {run.strategy!r} shares no model that states could be kept under: choose another")
    outcome = execute(run, "grid:stacked")
    model = ctx.load(ctx.assemble(outcome.server.serving, None)).eval()
    return measure_states(model, ctx.population.users, run.seed)


def rows(leaks: Sequence[StateLeak]) -> list[dict[str, str]]:
    """For a table, a line a control."""

    def share(value: float | None) -> str:
        return "not released" if value is None else f"{value:.0%}"

    def gap(value: float) -> str:
        return f"{value:.0f}" if value >= 10 else f"{value:.2g}"

    return [
        {
            "control": leak.control,
            "users": str(leak.users),
            "found by the first layer": share(leak.first),
            "found by the last layer": share(leak.last),
            "chance": share(leak.chance),
            "error of the last window": "nothing to solve" if leak.error is None else gap(leak.error),
            "of a guess": gap(leak.guess),
        }
        for leak in leaks
    ]

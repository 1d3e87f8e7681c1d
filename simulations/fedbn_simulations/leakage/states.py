"""Information leaked by users' states: the person's identity and the content of the last window.

For each person, a state (`fedbn.online.state`) is computed from an earlier and from a later recording, with the same
rule and the same federated network. *Re-identification.* A person is re-identified if the state of the later recording
is nearest to their own state of the earlier one, among those of all people. *Inversion.* The channel means of the last
window at the first layer are solved for from two states one window apart. The error is in units of their standard
deviation over the person's windows. The control is to guess the mean.
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
from fedbn.online.drift.signal import InputMeans
from fedbn.online.prior import layer_priors
from fedbn.online.release import Release, reidentified, window_between
from fedbn.online.state import BNState
from fedbn.online.validation import require_batch_norm_formula
from fedbn.seeds import generator
from fedbn_simulations.engines.execute import execute

RULE = "pseudo"
CLIPPED = "pseudo:clip=3"
"""Noise requires a bound on the influence of one window."""

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
    """Information leaked by states under one control.

    Attributes:
        control: a key of `CONTROLS`.
        first, last: share of people re-identified by the first or the last layer; None if it is not released.
        error: of the last window's channel means; None if they cannot be solved for.
        guess: error of guessing the mean.
        users: number of people whose states are released.
        chance: share expected by guessing; None if no state is released.
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
class RecordedStates:
    """One person's states after each recording, and one window before the end of the first."""

    early: BNState
    before: BNState
    late: BNState


def recorded_states(model: nn.Module, users: Sequence[User], rule: str) -> list[RecordedStates]:
    """States of all users under a rule."""
    net = personalize(model, rule)
    out = []
    for person in users:
        states = []
        for windows in (person.train.x[:-1], person.train.x[-1:]):
            net(windows, user=person.name)
            states.append(net.state(person.name))
        net.reset(person.name)
        net(person.test.x, user=person.name)
        out.append(RecordedStates(states[1], states[0], net.state(person.name)))
    return out


def measure_states(model: nn.Module, users: Sequence[User], seed: int) -> list[StateLeak]:
    """Information leaked by states under each of `CONTROLS`.

    Args:
        model: the trained source model.
        users: at least two.
        seed: of the noise.

    Raises:
        UserError: fewer than two users, or a model without statistics.
    """
    require_statistics(model, "leakage of states")
    if len(users) < 2:
        raise UserError("re-identification needs at least two people: choose a scenario with more")
    prior, input_means = layer_priors(model), InputMeans(model, 1)
    first, *_, last = list(prior) * 2
    means = [input_means(p.train.x) for p in users]
    guess = _mean_error([(m[:-1].mean(0) - m[-1], m.std(0)) for m in means])
    out = []
    for name, (rule, release) in CONTROLS.items():
        draw = generator(seed, "release", name)
        released, errors = [], []
        for states, m in zip(recorded_states(model, users, rule), means, strict=True):
            if min(s.n for s in (states.early, states.before, states.late)) < release.minimum:
                continue
            early, before, late = (release.apply(s, prior, draw) for s in (states.early, states.before, states.late))
            released.append((early, late))
            if before.n < early.n and early.parts[first][0].n:
                errors.append((window_between(before, early)[first] - m[-1], m.std(0)))
        rates = {
            path: reidentified([e for e, _ in released], [s for _, s in released], path)
            if released and released[0][0].parts[path][0].n
            else None
            for path in (first, last)
        }
        error = _mean_error(errors) if errors else None
        out.append(StateLeak(name, rates[first], rates[last], error, guess, len(released)))
    return out


def _mean_error(errors: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> float:
    return float(torch.stack([(error.abs() / std.clamp_min(1e-12)).mean() for error, std in errors]).mean())


def state_leaks(run: Run) -> list[StateLeak]:
    """Train a run's model and measure the leakage of the states of all its users.

    Raises:
        UserError: the run is invalid, shares no model, or has too few users.
    """
    run = run.resolved()
    ctx = build_context(run)
    if ctx.treatment.is_local_only:
        raise UserError(f"strategy {run.strategy!r} shares no model, which states depend on: choose another")
    require_batch_norm_formula(ctx.scratch, "leakage of states")
    outcome = execute(run, "grid:stacked")
    model = ctx.load(ctx.assemble(outcome.server.serving, None)).eval()
    return measure_states(model, ctx.population.users, run.seed)


def rows(leaks: Sequence[StateLeak]) -> list[dict[str, str]]:
    """Table rows, one per control."""

    def share(value: float | None) -> str:
        return "not released" if value is None else f"{value:.0%}"

    def number(value: float) -> str:
        return f"{value:.0f}" if value >= 10 else f"{value:.2g}"

    return [
        {
            "control": leak.control,
            "users": str(leak.users),
            "identified by first layer": share(leak.first),
            "identified by last layer": share(leak.last),
            "chance": share(leak.chance),
            "error of last window": "not solvable" if leak.error is None else number(leak.error),
            "error of a guess": number(leak.guess),
        }
        for leak in leaks
    ]

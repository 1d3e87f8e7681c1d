r"""Base class of rules: which statistics normalize a user's window, and how the window updates them.

One equation covers nearly every published rule without gradients. With the moments :math:`(m, w)` of a
window (mean and variance over its positions), the user's :math:`(M, V)` and the prior's :math:`(\mu_0, v_0)`,

.. math::
    (M, V) &\leftarrow \operatorname{mix}\big((M, V), (m, w);\; a\big)\\
    (\mu, v) &= \operatorname{mix}\big((M, V), (\mu_0, v_0);\; r\big)\\
    \operatorname{mix}\big((M, V), (m, w); a\big)
      &= \big((1-a)M + a m,\;(1-a)V + a w + a(1-a)(m-M)^2\big),

mean and variance of a mixture. A rule is defined by its gain :math:`a`, its weight of the prior :math:`r`, whether
the last ("between") term counts, and whether a window is part of the statistics that normalize it
(``includes_current``).

Everything is vectorized over users (rows, ``U``) and over the channels of all layers side by side (``C``).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fedbn.errors import UserError
from fedbn.objects import split_options
from fedbn.online.statistics import Pair, Prior, State, WindowStatistics, mix
from fedbn.plugins import discover, parse, text_of
from fedbn.tta import methods

INF = math.inf
Ranges = tuple[tuple[str, float, float], ...]


@dataclass(frozen=True, kw_only=True)
class Rule:
    """Base class of all rules. It always uses the statistics of the prior.

    A rule overrides `gain`, `prior_share` and `between`, or `use` and `update`. All are pure functions. The fields
    below work with every rule.

    Attributes:
        name: name on the command line.
        about: one-line description.
        source: authors, year, link.
        includes_current: a window is part of the statistics that normalize it ("update, then use").
        keeps_state: the state can be exported; otherwise every window is normalized by itself.
        learns: `update` changes the state.
        classwise: `update` needs the posterior of each window, so windows of one user are processed one by one.
        requires: field of `fedbn.online.prior.LayerPrior` that the rule requires.
        ranges: least and largest value of options; those of base classes apply, too.
        gate: only windows whose largest posterior is at least this are used for updates.
        diversity: exponent g. The user's statistics have weight :math:`D^g` (`State.diversity`), the prior the rest.
            0: weight one.
        fade: the weight of the user's statistics in a layer is ``fade`` times that in the layer before.
        floor: least variance, as a share of the prior's.
        mean_only: use the prior's variances.
        clip: limit on a window's channel mean (distance from the prior's mean) and standard deviation, in standard
            deviations of the prior. It bounds the influence of one window. 0: no limit.
        guard: use the prior while adapted predictions are less certain
            (`fedbn.online.personalized.Personalized.predict`).

    >>> rule("ema:rate=0.05:diversity=1").diversity
    1.0
    """

    name: ClassVar[str]
    about: ClassVar[str]
    source: ClassVar[str] = ""
    includes_current: ClassVar[bool] = False
    keeps_state: ClassVar[bool] = True
    learns: ClassVar[bool] = True
    classwise: ClassVar[bool] = False
    requires: ClassVar[str] = ""
    ranges: ClassVar[Ranges] = (
        ("gate", 0, 1),
        ("diversity", 0, INF),
        ("fade", 0, 1),
        ("floor", 0, INF),
        ("clip", 0, INF),
    )

    gate: float = 0.0
    diversity: float = 0.0
    fade: float = 1.0
    floor: float = 0.0
    mean_only: bool = False
    clip: float = 0.0
    guard: bool = False

    def __post_init__(self) -> None:
        for option, low, high in (row for cls in type(self).__mro__ for row in vars(cls).get("ranges", ())):
            value = getattr(self, option)
            if not low <= value <= high:
                raise UserError(f"rule {self.name!r}: {option}={value:g} is out of range; use {low:g} to {high:g}")

    @property
    def learns_from_train_pass(self) -> bool:
        """Whether `update` gets the statistics of a second forward pass, in BN's training mode."""
        return False

    def clip_moments(self, prior: Prior, moments: Pair) -> Pair:
        """Row moments ``[B, C]``, limited by ``clip`` under the prior of each row."""
        if not self.clip:
            return moments
        limit = self.clip * prior.var.sqrt()
        mean = torch.minimum(torch.maximum(moments[0], prior.mean - limit), prior.mean + limit)
        return mean, torch.minimum(moments[1], limit**2)

    def start(self, prior: Prior, classes: int) -> State:
        """Initial state of users: one part with the prior's statistics and no windows."""
        return self.state_at_prior(prior, classes, 1)

    def state_at_prior(self, prior: Prior, classes: int, parts: int, extra: int = 0) -> State:
        """State whose parts have the prior's statistics and no windows, with ``extra`` rows of zeros."""
        users, channels = prior.mean.shape
        zeros = prior.mean.new_zeros
        return State(
            zeros(users),
            zeros(users, parts),
            prior.mean[:, None].repeat(1, parts, 1),
            prior.var[:, None].repeat(1, parts, 1),
            zeros(users, classes),
            zeros(users, extra, channels),
        )

    def gain(self, state: State, weight: Tensor) -> Tensor:
        """Gain a: the share of the new windows, ``[U]``.

        Args:
            state: state before the update.
            weight: ``[U]`` number of windows in the update, positive, not necessarily integers.
        """
        return torch.zeros_like(weight)

    def prior_share(self, prior: Prior, state: State) -> Tensor:
        """Share r of the prior, broadcastable to ``[U, C]``."""
        return state.n.new_zeros(())

    def between(self) -> bool:
        """Whether the variance between window means counts, in `update` and in `use`."""
        return True

    def use(self, prior: Prior, state: State) -> Pair:
        """Mean and variance to normalize by, ``[U, C]`` each."""
        return mix(state.moments, prior.moments, self.prior_share(prior, state), between=self.between())

    def update(self, prior: Prior, state: State, window: WindowStatistics, weight: Tensor, posterior: Tensor) -> State:
        """State after an update; the caller updates ``t`` and ``classes``.

        Args:
            prior: prior of these users.
            state: state before the update.
            window: statistics of the new windows, one row per user.
            weight: ``[U]`` windows per row, positive.
            posterior: ``[U, K]``, mean over the windows of each row; zeros if unknown.
        """
        a = self.gain(state, weight)[:, None]
        if self.between():
            mean, var = mix(state.moments, (window.mean, window.var), a)
        else:
            one_value = window.positions * weight[:, None] <= 1
            target = torch.where(one_value, state.var[:, 0], window.unbiased(weight))
            mean, var = mix(state.moments, (window.mean, target), a, between=False)
        return replace(state, n=state.n + weight[:, None], mean=mean[:, None], var=var[:, None])

    def statistics(self, prior: Prior, state: State) -> Pair:
        """Mean and variance of `use` with the common options applied, ``[U, C]`` each."""
        pair = self.use(prior, state)
        if self.fade < 1:
            pair = mix(prior.moments, pair, torch.pow(torch.full_like(prior.eps, self.fade), prior.layer))
        if self.diversity:
            pair = mix(prior.moments, pair, state.diversity()[:, None] ** self.diversity)
        mean, var = pair
        if self.mean_only:
            var = prior.var
        return mean, torch.maximum(var, self.floor * prior.var)


@dataclass(frozen=True)
class RunningAverage(Rule):
    """Base of rules with a constant gain.

    Attributes:
        rate: gain of a step.
    """

    ranges: ClassVar[Ranges] = (("rate", 0, 1),)
    rate: float = 0.1

    def gain(self, state: State, weight: Tensor) -> Tensor:
        return self.rate * weight.clamp(max=1)


@dataclass(frozen=True)
class TrainPass(Rule):
    """Base of running averages that offer the training-mode pass of their authors' code.

    Attributes:
        pass_: option ``pass``, the forward pass that is measured. ``eval``: the one that makes the prediction.
            ``train``: a second one, in which each layer normalizes by the statistics of the user's current rows, as BN
            does in training mode. This changes the inputs, and so the statistics, of all layers but the first.
    """

    pass_: Literal["eval", "train"] = "eval"

    @property
    def learns_from_train_pass(self) -> bool:
        return self.pass_ == "train"


@dataclass(frozen=True)
class BatchRule(Rule):
    """Base of rules that use the user's rows in the current call and keep no state."""

    includes_current = True
    keeps_state = False

    def gain(self, state: State, weight: Tensor) -> Tensor:
        return torch.ones_like(weight)

    def update(self, prior: Prior, state: State, window: WindowStatistics, weight: Tensor, posterior: Tensor) -> State:
        # A single value has no variance. The prior's is used then, not that of an earlier call.
        start = replace(state, mean=prior.mean[:, None], var=prior.var[:, None])
        return super().update(prior, start, window, weight, posterior)


def equal_mixture(mean: Tensor, var: Tensor) -> Pair:
    """Moments of the mixture of ``[U, K, C]`` with equal weights."""
    center = mean.mean(1)
    return center, (var + (mean - center[:, None]) ** 2).mean(1)


@dataclass(frozen=True)
class ClassConditional(Rule):
    """Base of rules that compare the moments of each class with the source's moments of the same class.

    Attributes:
        n0: windows of a class after which its shift has weight one half.
    """

    classwise = True
    requires = "class_mean"
    ranges = (("n0", 0, INF),)
    n0: float = 4.0

    def start(self, prior: Prior, classes: int) -> State:
        prior.class_moments(self.name)
        return self.state_at_prior(prior, classes, classes)

    def update(self, prior: Prior, state: State, window: WindowStatistics, weight: Tensor, posterior: Tensor) -> State:
        by_class = posterior * weight[:, None]
        n = state.n + by_class
        share = torch.where(by_class > 0, by_class / n.clamp_min(1e-12), 0.0)[:, :, None]
        mean, var = mix((state.mean, state.var), (window.mean[:, None], window.var[:, None]), share)
        return replace(state, n=n, mean=mean, var=var)

    def class_shifts(self, prior: Prior, state: State) -> Pair:
        """Weight ``[U, K, 1]`` and shift ``[U, K, C]`` of each class; 0 for classes without windows."""
        u = (state.n / (state.n + self.n0).clamp_min(1e-12))[:, :, None]
        return u, torch.where(u > 0, state.mean - prior.class_moments(self.name)[0], 0.0)


def rules() -> dict[str, type[Rule]]:
    """All rules, by name."""
    return discover("fedbn.online.rules", Rule)


def rule(text: str) -> Rule:
    """Rule from a text such as ``name:option=value:option=value``.

    Raises:
        UserError: unknown name or option (the closest one is suggested), a value out of range, or a test-time method.

    >>> rule("pseudo:n0=64:floor=0.05").n0
    64.0
    """
    if (name := split_options(text)[0]) in methods():
        raise not_a_rule(name)
    return parse(text, "rule", rules(), Rule)


def not_a_rule(name: str) -> UserError:
    """The error if a test-time method is given where a rule is needed."""
    return UserError(
        f"{name!r} is a test-time method, which changes weights or outputs, not a rule on statistics: compare it by "
        f"`fedbn adapt --rules {name}`, or use fedbn.tta.Adapter for one user's stream"
    )


def rule_text(chosen: str | Rule | type[Rule]) -> str:
    """The text that `rule` converts to a rule that is given as an object.

    Raises:
        UserError: another object.
    """
    return text_of(chosen, "rule", rules(), Rule)


def client_rule(text: str) -> Rule:
    """Rule that a client can use with its own windows and a prior from the federation.

    Raises:
        UserError: as for `rule`, the rule needs labeled data of other users, or it is ``auto``.

    >>> client_rule("population:diversity=1").requires
    'n0'
    """
    if text == "auto":
        raise UserError(
            "rule 'auto' needs a check on seen users for every strategy: run fedbn adapt SCENARIO --strategies ... "
            "--rules auto, or name a rule here, e.g. population:diversity=1"
        )
    parsed = rule(text)
    if parsed.requires not in ("", "n0"):
        raise UserError(
            f"rule {text!r} needs labeled windows of seen users, which no client sends: use it with "
            "fedbn adapt, or choose another rule here (pseudo, population, ema, ...)"
        )
    return parsed

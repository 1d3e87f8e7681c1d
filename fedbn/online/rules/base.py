r"""How a user's statistics follow a stream: which to use now, and how to move them afterwards, are two questions.

Nearly every published rule without gradients answers them by one equation. With the moments :math:`(m, w)` of a
window (mean and variance over its positions), the user's :math:`(M, V)` and the prior's :math:`(\mu_0, v_0)`,

.. math::
    (M, V) &\leftarrow \operatorname{mix}\big((M, V), (m, w);\; a\big)\\
    (\mu, v) &= \operatorname{mix}\big((M, V), (\mu_0, v_0);\; r\big)\\
    \operatorname{mix}\big((M, V), (m, w); a\big)
      &= \big((1-a)M + a m,\;(1-a)V + a w + a(1-a)(m-M)^2\big),

mean and variance of a mixture. A rule is its gain :math:`a`, its weight of the prior :math:`r`, whether the last
("between") term counts, and whether a window is inside the statistics that it is normalized by (``includes_current``).

Everything is vectorized over users (rows, ``U``) and over the channels of all layers side by side (``C``).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from fedbn.errors import UserError
from fedbn.online.statistics import Pair, Prior, State, WindowStatistics, mix
from fedbn.plugins import discover, parse


@dataclass(frozen=True, kw_only=True)
class Rule:
    """The prior's statistics for ever; base of all rules.

    A rule overrides `gain`, `prior_share` and `between`, or else `use` and `update`; all are pure. The fields below
    work with every rule.

    Attributes:
        name: what the command line calls it.
        about: one line for lists.
        source: authors, year, link.
        includes_current: a window is inside the statistics that normalize it ("update, then use").
        keeps: there is a state worth exporting; otherwise every window is normalized by itself.
        learns: `update` does something.
        classwise: `update` needs the posterior of each window, so several of one user are taken one after the other.
        wants: field of `fedbn.online.prior.LayerPrior` that the rule cannot do without.
        gate: windows are learnt from only if their largest posterior is at least this.
        diversity: exponent g; :math:`D^g` of the user's statistics is used and the rest is the prior's
            (`State.diversity`). 0: all of it.
        fade: every layer is given ``fade`` times what the one before it is given of the user's statistics.
        floor: variances stay above this share of the prior's.
        mean_only: variances are the prior's.
        clip: what a window says of a channel is taken for no further from the prior's mean than this many of the
            prior's standard deviations, and for no more spread than that; 0: as it is. One window can do only so much.
        guard: answers are the prior's own while the adapted ones are the less certain
            (`fedbn.online.personalized.Personalized.predict`).

    >>> from fedbn.online import rule
    >>> rule("ema:rate=0.05:diversity=1").diversity
    1.0
    """

    name: ClassVar[str]
    about: ClassVar[str]
    source: ClassVar[str] = ""
    includes_current: ClassVar[bool] = False
    keeps: ClassVar[bool] = True
    learns: ClassVar[bool] = True
    classwise: ClassVar[bool] = False
    wants: ClassVar[str] = ""

    gate: float = 0.0
    diversity: float = 0.0
    fade: float = 1.0
    floor: float = 0.0
    mean_only: bool = False
    clip: float = 0.0
    guard: bool = False

    def __post_init__(self) -> None:
        self.within("gate", 0, 1)
        self.within("diversity", 0)
        self.within("fade", 0, 1)
        self.within("floor", 0)
        self.within("clip", 0)

    def within(self, option: str, low: float, high: float = float("inf")) -> None:
        """Check an option's value.

        Raises:
            UserError: it is outside ``[low, high]``.
        """
        value = getattr(self, option)
        if not low <= value <= high:
            raise UserError(f"rule {self.name!r}: {option}={value:g} is impossible; give {low:g} to {high:g}")

    def heard(self, prior: Prior, seen: Pair) -> Pair:
        """Row moments ``[B, C]`` as far as they are believed (``clip``), under the prior of each row."""
        if not self.clip:
            return seen
        reach = self.clip * prior.var.sqrt()
        mean = torch.minimum(torch.maximum(seen[0], prior.mean - reach), prior.mean + reach)
        return mean, torch.minimum(seen[1], reach**2)

    def start(self, prior: Prior, classes: int) -> State:
        """The state of users who have not been met: one part, at the prior's statistics, worth nothing."""
        return self.parts_at(prior, classes, 1)

    def parts_at(self, prior: Prior, classes: int, parts: int, extra: int = 0) -> State:
        """A state with every part at the prior's statistics, worth nothing, and ``extra`` rows of zeros."""
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
        """a, the share of the new windows, ``[U]``.

        Args:
            state: before the update.
            weight: ``[U]`` windows (or parts of one) behind the update, positive.
        """
        return torch.zeros_like(weight)

    def prior_share(self, prior: Prior, state: State) -> Tensor:
        """r, the share of the prior, broadcastable to ``[U, C]``."""
        return state.n.new_zeros(())

    def between(self) -> bool:
        """Whether the spread of windows about their mean counts as variance, in `update` and in `use`."""
        return True

    def use(self, prior: Prior, state: State) -> Pair:
        """Mean and variance to normalize by, ``[U, C]`` each."""
        return mix(state.moments, prior.moments, self.prior_share(prior, state), between=self.between())

    def update(self, prior: Prior, state: State, seen: WindowStatistics, weight: Tensor, posterior: Tensor) -> State:
        """The state after learning from ``seen``; ``t`` and ``classes`` are counted by the caller.

        Args:
            prior: of these users.
            state: before.
            seen: a row a user.
            weight: ``[U]`` windows behind each row, positive.
            posterior: ``[U, K]``, mean over the windows of each row; zeros where nothing is known.
        """
        a = self.gain(state, weight)[:, None]
        if self.between():
            mean, var = mix(state.moments, (seen.mean, seen.var), a)
        else:
            one_value = seen.positions * weight[:, None] <= 1
            target = torch.where(one_value, state.var[:, 0], seen.unbiased(weight))
            mean, var = mix(state.moments, (seen.mean, target), a, between=False)
        return replace(state, n=state.n + weight[:, None], mean=mean[:, None], var=var[:, None])

    def statistics(self, prior: Prior, state: State) -> Pair:
        """`use`, with what the fields of every rule ask for; ``[U, C]`` each."""
        pair = self.use(prior, state)
        if self.fade < 1:
            pair = mix(prior.moments, pair, torch.pow(torch.full_like(prior.eps, self.fade), prior.layer))
        if self.diversity:
            pair = mix(prior.moments, pair, state.diversity()[:, None] ** self.diversity)
        mean, var = pair
        if self.mean_only:
            var = prior.var
        return mean, torch.maximum(var, self.floor * prior.var)


def merge_by_class(state: State, seen: WindowStatistics, weight: Tensor) -> State:
    """Merge a window into the moments of each class with ``weight`` ``[U, K]``."""
    n = state.n + weight
    share = torch.where(weight > 0, weight / n.clamp_min(1e-12), 0.0)[:, :, None]
    mean, var = mix((state.mean, state.var), (seen.mean[:, None], seen.var[:, None]), share)
    return replace(state, n=n, mean=mean, var=var)


@dataclass(frozen=True)
class ClassConditional(Rule):
    """Base of rules that keep moments of every class and compare them with the source's of the same class.

    Attributes:
        n0: windows of a class before it is believed by half.
    """

    classwise = True
    wants = "class_mean"

    n0: float = 4.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.within("n0", 0)

    def start(self, prior: Prior, classes: int) -> State:
        prior.classwise(self.name)
        return self.parts_at(prior, classes, classes)

    def update(self, prior: Prior, state: State, seen: WindowStatistics, weight: Tensor, posterior: Tensor) -> State:
        return merge_by_class(state, seen, posterior * weight[:, None])

    def belief(self, prior: Prior, state: State) -> Pair:
        """How far each class is believed, ``[U, K, 1]``, and the user's shift in it, ``[U, K, C]``; 0 where unmet."""
        u = (state.n / (state.n + self.n0).clamp_min(1e-12))[:, :, None]
        return u, torch.where(u > 0, state.mean - prior.classwise(self.name)[0], 0.0)


def rules() -> dict[str, type[Rule]]:
    """Name -> class of every rule found."""
    return discover("fedbn.online.rules", Rule)


def rule(text: str) -> Rule:
    """A rule from ``name:option=value:option=value``.

    Raises:
        UserError: unknown name or option (the nearest is suggested), or an impossible value.

    >>> rule("pseudo:n0=64:floor=0.05").n0
    64.0
    """
    return parse(text, "rule", rules())


def client_rule(text: str) -> Rule:
    """A rule that a client can follow by itself, with what a federation has told it.

    Raises:
        UserError: as `rule`, or the rule needs what only labeled data of many users tell.

    >>> client_rule("population:diversity=1").wants
    'n0'
    """
    chosen = rule(text)
    if chosen.wants not in ("", "n0"):
        raise UserError(
            f"rule {text!r} needs labeled windows of seen users, which no client sends: follow it with fedbn "
            "personalize, or choose another rule here (pseudo, population, ema, ...)"
        )
    return chosen

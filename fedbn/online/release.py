r"""Releasing a user's state from the device, and attacks that measure what it reveals.

Two states one window apart reveal that window's channel means exactly (`window_between`), and first-layer statistics
identify users (`reidentified`). `Release` limits this by a minimum number of windows, Gaussian noise on the sums of
clipped windows (`fedbn.online.rules.base.Rule.clip`), and a restriction to late layers. Class counts and alignments
are never released.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fedbn.errors import UserError
from fedbn.online.alignments.base import split_alignment
from fedbn.online.prior import LayerPrior
from fedbn.online.rules.base import rule
from fedbn.online.state import BNState
from fedbn.statistics.moments import Moments


@dataclass(frozen=True)
class Release:
    r"""Options for releasing a state from the device.

    Under a rule with ``clip`` c, replacing one of n windows moves a channel's sum of means by at most
    :math:`2c\sigma_0` and that of squared deviations by at most :math:`(2c\sigma_0)^2`, :math:`\sigma_0` the prior's
    standard deviation. The standard deviation of the noise is ``noise`` times these bounds. They limit the influence of
    one window on one channel of one release; they do not account for several channels, layers or releases.

    Attributes:
        minimum: minimum number of windows. The released count is rounded down to a multiple of it.
        noise: standard deviation of the noise in units of one window's influence; 0: no noise.
        last: number of last layers to release; 0: all. The other layers are released empty.
    """

    minimum: int = 200
    noise: float = 0.0
    last: int = 0

    def __post_init__(self) -> None:
        for option, low in (("minimum", 1), ("noise", 0), ("last", 0)):
            if getattr(self, option) < low:
                raise UserError(f"release: {option}={getattr(self, option):g} is out of range; use {low} or more")

    def apply(self, state: BNState, prior: Mapping[str, LayerPrior], draw: torch.Generator | None = None) -> BNState:
        """The released state, for aggregation by a server. The user continues with the original.

        Args:
            state: state of one user, from a rule with one part.
            prior: prior of the user, by path.
            draw: generator of the noise; None: the global one.

        Raises:
            UserError: too few windows, several parts, noise without clipping, or more layers than the network has.
        """
        clip = rule(split_alignment(state.rule)[1]).clip
        if self.noise and not clip:
            raise UserError(
                f"rule {state.rule!r} does not clip windows, so no noise can hide one: use {state.rule}:clip=3, "
                "or release without noise"
            )
        if state.n < self.minimum:
            raise UserError(
                f"this state has {state.n:g} windows, a release needs at least {self.minimum}: wait, or lower minimum"
            )
        if any(len(parts) > 1 for parts in state.parts.values()):
            raise UserError(
                f"rule {state.rule!r} has moments by class or component, which reveal habits: use another rule"
            )
        paths = list(state.parts)
        if self.last > len(paths):
            raise UserError(f"release: last={self.last} layers of a network that has {len(paths)}")
        count = float(int(state.n) // self.minimum * self.minimum)
        released = {path: (Moments.empty(len(moments.mean)),) for path, (moments,) in state.parts.items()}
        for path in paths[-self.last :]:
            released[path] = (self._add_noise(state.parts[path][0], clip, count, prior[path], draw),)
        tally = dict.fromkeys(state.tally, 0.0)
        return replace(
            state, parts=released, base={}, classes=torch.zeros_like(state.classes), tally=tally, alignment={}
        )

    def _add_noise(
        self, moments: Moments, clip: float, count: float, prior: LayerPrior, draw: torch.Generator | None
    ) -> Moments:
        mean, var = moments.mean, moments.variance()
        if self.noise:
            prior_var = prior.var.double().cpu()
            one_window = 2 * clip * prior_var.sqrt()
            draws = [torch.randn(t.shape, generator=draw, dtype=t.dtype) for t in (mean, var)]
            mean = mean + self.noise * one_window / moments.n * draws[0]
            var = var + self.noise * one_window**2 / moments.n * draws[1]
            # Post-processing of noisy values is free, and a variance must be positive.
            var = torch.maximum(var, 1e-3 * prior_var)
        return Moments.from_variance(count, mean, var)


def window_between(before: BNState, after: BNState) -> dict[str, Tensor]:
    """Attack: channel means ``[C]`` of the windows between two states, by layer.

    Exact for rules with plain moments (``pseudo``, ``cumulative``, ``population``).

    Raises:
        UserError: the second state has no more windows than the first.
    """
    if not after.n > before.n:
        raise UserError("there is no window between these states: pass the earlier one first")
    means = {}
    for path, (new, *_) in after.parts.items():
        old = before.parts[path][0]
        means[path] = (new.n * new.mean - old.n * old.mean) / (new.n - old.n).clamp_min(1e-12)
    return means


def reidentified(first: Sequence[BNState], second: Sequence[BNState], path: str) -> float:
    """Attack: share of users whose second state is closest to their own first state, by one layer.

    Args:
        first: states of the first session, one per user.
        second: states of the second session, in the same order.
        path: path of the layer; distances are 2-Wasserstein between Gaussians.
    """
    hits = 0
    for i, state in enumerate(second):
        distances = [float(state.parts[path][0].w2(other.parts[path][0])) for other in first]
        hits += distances.index(min(distances)) == i
    return hits / len(second)

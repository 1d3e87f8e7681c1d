r"""What of a user's state may leave the device, and what it gives away.

Two states one window apart give that window's channel means exactly (`window_between`), and first-layer statistics
tell people apart (`reidentified`). `Release` makes a state that tells less: none before a minimum count, Gaussian
noise on the sums of clipped windows (`fedbn.online.rules.base.Rule.clip`), late layers only; what was counted of
classes never leaves.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fedbn.errors import UserError
from fedbn.online.prior import LayerPrior
from fedbn.online.rules.base import rule
from fedbn.online.state import BNState
from fedbn.statistics.moments import Moments


@dataclass(frozen=True)
class Release:
    r"""How a state is made fit to leave the device.

    Under a rule with ``clip`` c, replacing one of n windows moves a channel's sum of means by at most
    :math:`2c\sigma_0` and that of squared deviations by at most :math:`(2c\sigma_0)^2`, :math:`\sigma_0` the prior's
    standard deviation. Noise has ``noise`` times these as its standard deviation. That bounds what one window can do to
    one channel of one release; it is no accounting over channels, layers or repeated releases.

    Attributes:
        minimum: windows below which nothing is released; the count told is rounded down to a multiple of it.
        noise: standard deviation of the noise in units of what one window can do; 0: none.
        last: layers that are released, counted from the last; 0: all. The others hold no window afterwards.
    """

    minimum: int = 200
    noise: float = 0.0
    last: int = 0

    def __post_init__(self) -> None:
        for option, low in (("minimum", 1), ("noise", 0), ("last", 0)):
            if getattr(self, option) < low:
                raise UserError(f"release: {option}={getattr(self, option):g} is impossible; give {low} or more")

    def of(self, state: BNState, prior: Mapping[str, LayerPrior], draw: torch.Generator | None = None) -> BNState:
        """A state that may leave, for a server to pool; not for its user to go on from.

        Args:
            state: of one user, kept by a rule with one part.
            prior: what the user started from, by path.
            draw: source of the noise; None: the global one.

        Raises:
            UserError: too few windows, several parts, noise without a clip, or more layers than there are.
        """
        clip = rule(state.rule).clip
        if self.noise and not clip:
            raise UserError(
                f"rule {state.rule!r} lets a window say anything, so no noise hides it: keep states by "
                f"{state.rule}:clip=3, or release without noise"
            )
        if state.n < self.minimum:
            raise UserError(
                f"this state holds {state.n:g} windows and at least {self.minimum} must be behind what is released: "
                "wait, or lower minimum"
            )
        if any(len(parts) > 1 for parts in state.parts.values()):
            raise UserError(f"rule {state.rule!r} keeps moments by class or component, which tell habits: not released")
        paths = list(state.parts)
        if self.last > len(paths):
            raise UserError(f"release: last={self.last} layers of a network that has {len(paths)}")
        shown = set(paths[-self.last :])
        told = float(int(state.n) // self.minimum * self.minimum)
        return replace(
            state,
            parts={
                path: (self._hidden(parts[0], clip, told, prior[path], draw),)
                if path in shown
                else (Moments.empty(len(parts[0].mean)),)
                for path, parts in state.parts.items()
            },
            base={},
            classes=torch.zeros_like(state.classes),
            tally=dict.fromkeys(state.tally, 0.0),
        )

    def _hidden(
        self, moments: Moments, clip: float, told: float, prior: LayerPrior, draw: torch.Generator | None
    ) -> Moments:
        mean, var = moments.mean, moments.variance()
        if self.noise:
            spread = prior.var.double().cpu()
            one_window = 2 * clip * spread.sqrt()
            mean = mean + self.noise * one_window / moments.n * torch.randn(
                mean.shape, generator=draw, dtype=mean.dtype
            )
            var = var + self.noise * one_window**2 / moments.n * torch.randn(var.shape, generator=draw, dtype=var.dtype)
            # What is noisy already may be worked on freely, and a variance has to be positive.
            var = torch.maximum(var, 1e-3 * spread)
        return Moments.from_variance(told, mean, var)


def window_between(before: BNState, after: BNState) -> dict[str, Tensor]:
    """Channel means ``[C]`` of the windows that were learnt between two states of a plain-moments rule, by layer.

    Exact for rules that keep plain moments (``pseudo``, ``cumulative``, ``population``): an attack to measure with.

    Raises:
        UserError: nothing was learnt in between.
    """
    if not after.n > before.n:
        raise UserError("no window lies between these states: give the earlier one first")
    found = {}
    for path, parts in after.parts.items():
        old, new = before.parts[path][0], parts[0]
        found[path] = (new.n * new.mean - old.n * old.mean) / (new.n - old.n).clamp_min(1e-12)
    return found


def reidentified(first: Sequence[BNState], second: Sequence[BNState], path: str) -> float:
    """Share of users whose state of a second session is nearest to their own of the first, by one layer alone.

    Args:
        first: a state a user.
        second: of the same users in the same order.
        path: of the layer; distances are 2-Wasserstein between Gaussians.
    """
    hits = 0
    for i, state in enumerate(second):
        distances = [float(state.parts[path][0].w2(other.parts[path][0])) for other in first]
        hits += distances.index(min(distances)) == i
    return hits / len(second)

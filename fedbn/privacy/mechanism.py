r"""What a client's message may tell: bounded, noised, or summed with others' before anyone looks.

Parameters, statistics and counters need different treatment. Of *parameters* the update is clipped. *Statistics* are
moments: they are released as sums shifted by what the server sent, in its own scale,

.. math:: s_1=(\mu-\mu_g)/\sigma_g,\qquad s_2=\big(\sigma^2+(\mu-\mu_g)^2\big)/\sigma_g^2-1,

so that one bound serves every layer, clipped as one vector, and turned back into a mean and a variance, which is never
less than ``floor`` times the server's. *Counters* and the number of examples are not sent at all: every client counts
the same. Clipping all entries as one vector, as wrappers around whole state dicts do, spends the bound on counters and
statistics, and noise added to variances makes them negative.

The unit is the user: all of one user's data may be replaced. Noise is added by the client to its own message, so the
guarantee needs no trust in the server. Gaussian mechanism: Dwork and Roth, 2014,
https://doi.org/10.1561/0400000042; clipped updates: McMahan et al., 2018, https://arxiv.org/abs/1710.06963.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fedbn.errors import UserError
from fedbn.nn.roles import Role, State
from fedbn.plugins import parse, render
from fedbn.strategies.base import Update
from fedbn.strategies.ownership import Ownership


@dataclass(frozen=True)
class Privacy:
    """How messages from clients are protected.

    Attributes:
        clip: largest L2 norm of a client's update of parameters.
        clip_statistics: largest L2 norm of its shifted sums of statistics; None: as ``clip``.
        noise: standard deviation of the client's Gaussian noise, in units of the bound.
        floor: least variance, as a share of the server's.
        delta: probability for which the guarantee may fail, for the epsilon that is stated.
        secure: the server sees sums over the clients of a round only (`fedbn.privacy.secure_aggregation`).
        bits: binary digits after the point in secure sums.
        entropy: noise from the ``run``'s seed, so that runs repeat, or from the ``system``'s, so that nobody can
            subtract it.

    Raises:
        UserError: a value out of range.
    """

    name: ClassVar[str] = "privacy"
    clip: float = math.inf
    clip_statistics: float | None = None
    noise: float = 0.0
    floor: float = 1e-3
    delta: float = 1e-5
    secure: bool = False
    bits: int = 24
    entropy: Literal["run", "system"] = "run"

    def __post_init__(self) -> None:
        for name in ("clip", "clip_statistics"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise UserError(f"privacy: {name} must be positive, not {value}")
        if not 0 <= self.noise < math.inf:
            raise UserError(f"privacy: noise must be finite and at least 0, not {self.noise}")
        if self.noise and math.inf in (self.clip, self.bound):
            raise UserError("privacy: noise needs a bound to be measured by: give clip too, such as clip=1:noise=0.5")
        if not 0 < self.floor <= 1:
            raise UserError(f"privacy: floor is a share of the server's variance in (0, 1], not {self.floor}")
        if not 0 < self.delta < 1:
            raise UserError(f"privacy: delta lies between 0 and 1, not {self.delta}")
        if not 8 <= self.bits <= 40:
            raise UserError(f"privacy: bits must lie between 8 and 40, not {self.bits}")

    @property
    def bound(self) -> float:
        """Largest norm of statistics."""
        return self.clip if self.clip_statistics is None else self.clip_statistics

    @property
    def changes(self) -> bool:
        """Whether anything is clipped or noised."""
        return min(self.clip, self.bound) < math.inf


def parse_privacy(text: str) -> Privacy | None:
    """The protection that a text such as ``clip=1:noise=0.5`` describes; None for none.

    >>> parse_privacy("clip=2:noise=0.5").clip
    2.0

    Raises:
        UserError: an unknown option, or a value out of range.
    """
    found = parse(f"privacy:{text}", "privacy", {"privacy": Privacy}) if text else Privacy()
    return None if found == Privacy() else found


def render_privacy(text: str) -> str:
    """The shortest text for the same protection.

    >>> render_privacy("noise=0:clip=1.0")
    'clip=1.0'
    """
    found = parse_privacy(text)
    return "" if found is None else render(found).removeprefix("privacy:")


def statistics_pairs(table: Ownership) -> list[tuple[str, str]]:
    """Names of the travelling (mean, variance) entries.

    Raises:
        UserError: a travelling statistic that is neither, or lacks the other.
    """
    keys = [k for k in table.travels if table.roles[k] is Role.STATISTICS]
    pairs = [(k, k.removesuffix("mean") + "var") for k in keys if k.rpartition(".")[2] == "running_mean"]
    if odd := set(keys) - {k for pair in pairs for k in pair} | {v for _, v in pairs} - set(keys):
        raise UserError(
            f"privacy knows means and variances; {', '.join(sorted(odd))} is something else: choose a strategy "
            "with plain batch normalization, or one that keeps statistics local"
        )
    return pairs


def parameter_keys(table: Ownership) -> list[str]:
    """Names of the travelling entries that are no statistics."""
    return [k for k in table.travels if table.roles[k] is not Role.STATISTICS]


def to_sums(state: State, center: State, pairs: Sequence[tuple[str, str]]) -> Tensor:
    """Means and variances as shifted sums for a weight of one, ``[2 x channels of all layers]`` float64.

    Args:
        state: holds the entries.
        center: what the server sent; sums are shifted and scaled by it.
        pairs: names of means and variances.
    """
    parts = []
    for mean, var in pairs:
        scale = _scale(center[var])
        shift = (state[mean].double() - center[mean].double()) / scale
        parts += [shift, state[var].double() / scale**2 + shift**2 - 1]
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.float64)


def from_sums(sums: Tensor, center: State, pairs: Sequence[tuple[str, str]], floor: float) -> State:
    """The inverse of `to_sums`; no variance is less than ``floor`` times the center's."""
    out: State = {}
    at = 0
    for mean, var in pairs:
        size, scale = center[mean].numel(), _scale(center[var])
        first, second = sums[at : at + size], sums[at + size : at + 2 * size]
        at += 2 * size
        out[mean] = (center[mean].double() + scale * first).to(center[mean].dtype)
        out[var] = ((second + 1 - first**2).clamp_min(floor) * scale**2).to(center[var].dtype)
    return out


def _scale(variance: Tensor) -> Tensor:
    return variance.double().clamp_min(1e-8).sqrt()


def clipped(vector: Tensor, bound: float) -> Tensor:
    """A vector no longer than ``bound``; itself if it is not.

    >>> clipped(torch.tensor([3.0, 4.0]), 1.0)
    tensor([0.6000, 0.8000])

    Raises:
        UserError: not finite.
    """
    norm = float(torch.linalg.vector_norm(vector.double()))
    if not math.isfinite(norm):
        raise UserError("a client's update is not finite, so no bound can be put on it: lower the learning rate")
    # A hair below the bound, since the norm after scaling is rounded again.
    return vector * (bound / norm * (1 - 1e-12)) if norm > bound else vector


def flat(state: State, keys: Sequence[str]) -> Tensor:
    """Entries as one vector, float64."""
    return torch.cat([state[k].double().flatten().cpu() for k in keys]) if keys else torch.zeros(0).double()


def unflat(vector: Tensor, like: State, keys: Sequence[str]) -> State:
    """The inverse of `flat`, with the shapes and dtypes of ``like``."""
    parts = vector.split([like[k].numel() for k in keys])
    return {k: p.view(like[k].shape).to(like[k].device, like[k].dtype) for k, p in zip(keys, parts, strict=True)}


def released(rule: Privacy, update: Update, received: State, table: Ownership, draw: torch.Generator) -> Update:
    """An update whose every part is bounded and noised.

    Args:
        rule: bounds and noise.
        update: what the client would send.
        received: what it was sent.
        table: who owns what.
        draw: source of the noise.

    Raises:
        UserError: the update is not finite, or tells more than entries.
    """
    if update.notes:
        raise UserError(
            f"privacy covers the model's entries, but the treatment also sends {', '.join(sorted(update.notes))}: "
            "choose another treatment, or no --privacy"
        )
    state = dict(update.state)
    if keys := parameter_keys(table):
        before = flat(received, keys)
        moved = flat(update.state, keys) - before
        bounded = clipped(moved, rule.clip)
        if bounded is not moved or rule.noise:
            state |= unflat(before + _noised(bounded, rule.noise * rule.clip, draw), received, keys)
    if pairs := statistics_pairs(table):
        ctx = {k: v.cpu() for k, v in received.items()}
        sums = to_sums({k: v.cpu() for k, v in update.state.items()}, ctx, pairs)
        bounded = clipped(sums, rule.bound)
        if bounded is not sums or rule.noise:
            told = from_sums(_noised(bounded, rule.noise * rule.bound, draw), ctx, pairs, rule.floor)
            state |= {k: v.to(received[k].device) for k, v in told.items()}
    return replace(update, state={k: state[k] for k in update.state}, examples=1)


def _noised(vector: Tensor, scale: float, draw: torch.Generator) -> Tensor:
    return vector + scale * torch.randn(len(vector), dtype=torch.float64, generator=draw) if scale else vector

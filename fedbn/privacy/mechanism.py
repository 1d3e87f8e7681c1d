r"""Differentially private messages of clients: clipping, noise and options of secure aggregation.

Parameters, statistics and counters are handled differently. For *parameters*, the update is clipped. *Statistics* are
moments: they are released as sums, shifted and scaled by the server's statistics,

.. math:: s_1=(\mu-\mu_g)/\sigma_g,\qquad s_2=\big(\sigma^2+(\mu-\mu_g)^2\big)/\sigma_g^2-1,

so that one bound fits every layer. They are clipped as one vector and converted back into a mean and a variance, which
is at least ``floor`` times the server's. *Counters* and the number of examples are not sent: all clients have equal
weight. Clipping all entries as one vector, as wrappers around whole state dicts do, spends the bound on counters and
statistics, and noise added to variances makes them negative.

The guarantee is at user level: all of one user's data may be replaced. Each client adds noise to its own message, so
the guarantee does not depend on trust in the server. Gaussian mechanism: Dwork and Roth, 2014,
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
from fedbn.nn.roles import State
from fedbn.plugins import parse, render
from fedbn.strategies.base import Update
from fedbn.strategies.ownership import Ownership


@dataclass(frozen=True)
class Privacy:
    """Protection of the messages from clients.

    Attributes:
        clip: largest L2 norm of a client's parameter update.
        clip_statistics: largest L2 norm of its shifted sums of statistics; None: same as ``clip``.
        noise: standard deviation of the client's Gaussian noise, relative to the clipping bound.
        floor: smallest variance, relative to the server's.
        delta: probability that the guarantee fails, for which epsilon is reported.
        secure: whether the server receives only sums over the clients of a round
            (`fedbn.privacy.secure_aggregation`).
        bits: fractional bits of the fixed-point numbers in secure sums.
        entropy: source of the noise: the seed of the ``run``, which makes runs reproducible, or random numbers of the
            ``system``, so that the noise cannot be reproduced and subtracted.

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
        if self.noise and math.inf in (self.clip, self.statistics_bound):
            raise UserError("privacy: noise is relative to a clipping bound: give clip too, such as clip=1:noise=0.5")
        if not 0 < self.floor <= 1:
            raise UserError(f"privacy: floor, a share of the server's variance, must lie in (0, 1], not {self.floor}")
        if not 0 < self.delta < 1:
            raise UserError(f"privacy: delta must lie between 0 and 1, not {self.delta}")
        if not 8 <= self.bits <= 40:
            raise UserError(f"privacy: bits must lie between 8 and 40, not {self.bits}")

    @property
    def statistics_bound(self) -> float:
        """Largest L2 norm of the shifted sums of statistics."""
        return self.clip if self.clip_statistics is None else self.clip_statistics

    @property
    def is_bounded(self) -> bool:
        """Whether anything is clipped; noise implies clipping."""
        return min(self.clip, self.statistics_bound) < math.inf


def parse_privacy(text: str) -> Privacy | None:
    """Parse a text such as ``clip=1:noise=0.5``; None if it describes no protection.

    >>> parse_privacy("clip=2:noise=0.5").clip
    2.0

    Raises:
        UserError: an unknown option, or a value out of range.
    """
    privacy = parse(f"privacy:{text}", "privacy", {"privacy": Privacy}) if text else Privacy()
    return None if privacy == Privacy() else privacy


def render_privacy(text: str) -> str:
    """Shortest text of the same protection.

    >>> render_privacy("noise=0:clip=1.0")
    'clip=1.0'
    """
    privacy = parse_privacy(text)
    return "" if privacy is None else render(privacy).removeprefix("privacy:")


def statistics_pairs(table: Ownership) -> list[tuple[str, str]]:
    """Names of the shared (running mean, running variance) entries.

    Raises:
        UserError: a shared statistic that is neither a mean nor a variance, or has no counterpart.
    """
    keys = table.shared_statistics
    pairs = [(k, k.removesuffix("mean") + "var") for k in keys if k.rpartition(".")[2] == "running_mean"]
    if unpaired := set(keys) - {k for pair in pairs for k in pair} | {v for _, v in pairs} - set(keys):
        raise UserError(
            f"privacy supports pairs of means and variances, not {', '.join(sorted(unpaired))}: choose a strategy "
            "with plain batch normalization, or one whose statistics stay local"
        )
    return pairs


def to_sums(state: State, center: State, pairs: Sequence[tuple[str, str]]) -> Tensor:
    """Convert means and variances to shifted sums of weight one, ``[2 x channels of all layers]`` float64.

    Args:
        state: entries of the client.
        center: the server's entries, which shift and scale the sums.
        pairs: names of means and variances.
    """
    parts = []
    for mean, var in pairs:
        scale = _scale(center[var])
        shift = (state[mean].double() - center[mean].double()) / scale
        parts += [shift, state[var].double() / scale**2 + shift**2 - 1]
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.float64)


def from_sums(sums: Tensor, center: State, pairs: Sequence[tuple[str, str]], floor: float) -> State:
    """Inverse of `to_sums`; variances are at least ``floor`` times the center's."""
    out: State = {}
    start = 0
    for mean, var in pairs:
        size, scale = center[mean].numel(), _scale(center[var])
        first, second = sums[start : start + size], sums[start + size : start + 2 * size]
        start += 2 * size
        out[mean] = (center[mean].double() + scale * first).to(center[mean].dtype)
        out[var] = ((second + 1 - first**2).clamp_min(floor) * scale**2).to(center[var].dtype)
    return out


def _scale(variance: Tensor) -> Tensor:
    return variance.double().clamp_min(1e-8).sqrt()


def clip_norm(vector: Tensor, bound: float) -> Tensor:
    """Scale a vector to norm ``bound`` if it is longer; otherwise return it unchanged.

    >>> clip_norm(torch.tensor([3.0, 4.0]), 1.0)
    tensor([0.6000, 0.8000])

    Raises:
        UserError: the vector is not finite.
    """
    norm = float(torch.linalg.vector_norm(vector.double()))
    if not math.isfinite(norm):
        raise UserError("a client's update is not finite and cannot be clipped: lower the learning rate")
    # Slightly below the bound, because the scaled vector is rounded again.
    return vector * (bound / norm * (1 - 1e-12)) if norm > bound else vector


def flatten_entries(state: State, keys: Sequence[str]) -> Tensor:
    """Concatenate entries into one float64 vector."""
    return torch.cat([state[k].double().flatten().cpu() for k in keys]) if keys else torch.zeros(0).double()


def unflatten_entries(vector: Tensor, like: State, keys: Sequence[str]) -> State:
    """Inverse of `flatten_entries`, with the shapes and dtypes of ``like``."""
    parts = vector.split([like[k].numel() for k in keys])
    return {k: p.view(like[k].shape).to(like[k].device, like[k].dtype) for k, p in zip(keys, parts, strict=True)}


def clip_and_noise(
    privacy: Privacy, update: Update, received: State, table: Ownership, draw: torch.Generator
) -> Update:
    """Clip and noise the parameters and the statistics of an update.

    Args:
        privacy: clipping bounds and noise.
        update: the client's update.
        received: shared entries that the client received.
        table: ownership of the entries.
        draw: source of the noise.

    Raises:
        UserError: the update is not finite, or holds more than the model's entries.
    """
    if update.notes:
        raise UserError(
            f"privacy covers the model's entries, but the method also sends {', '.join(sorted(update.notes))}: "
            "choose another method, or no --privacy"
        )
    state = dict(update.state)
    if keys := table.shared_parameters:
        before = flatten_entries(received, keys)
        change = flatten_entries(update.state, keys) - before
        clipped = clip_norm(change, privacy.clip)
        if clipped is not change or privacy.noise:
            state |= unflatten_entries(before + _add_noise(clipped, privacy.noise * privacy.clip, draw), received, keys)
    if pairs := statistics_pairs(table):
        center = {k: v.cpu() for k, v in received.items()}
        sums = to_sums({k: v.cpu() for k, v in update.state.items()}, center, pairs)
        clipped = clip_norm(sums, privacy.statistics_bound)
        if clipped is not sums or privacy.noise:
            noised = _add_noise(clipped, privacy.noise * privacy.statistics_bound, draw)
            statistics = from_sums(noised, center, pairs, privacy.floor)
            state |= {k: v.to(received[k].device) for k, v in statistics.items()}
    return replace(update, state={k: state[k] for k in update.state}, examples=1)


def _add_noise(vector: Tensor, scale: float, draw: torch.Generator) -> Tensor:
    return vector + scale * torch.randn(len(vector), dtype=torch.float64, generator=draw) if scale else vector

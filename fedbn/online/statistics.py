"""Statistics, priors and states of online rules."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import TypeVar

import torch
from torch import Tensor

from fedbn.errors import UserError

V = TypeVar("V")

Pair = tuple[Tensor, Tensor]
"""Mean and variance, ``[U, C]`` each."""


MAX_SECOND_MOMENT = 1e30
"""Largest mean square of a channel. A mixture of moments within this limit is within it, and far from overflow."""


def within_limits(mean: Tensor, var: Tensor) -> Tensor:
    """Whether moments ``[..., C]`` are finite, not negative, and at most `MAX_SECOND_MOMENT`, over the channels.

    >>> within_limits(torch.tensor([[0.0], [1e20], [torch.nan]]), torch.ones(3, 1))
    tensor([ True, False, False])
    """
    return ((var >= 0) & (mean.square() + var <= MAX_SECOND_MOMENT)).all(-1)


def mix(a: Pair, b: Pair, share: Tensor, *, between: bool = True) -> Pair:
    """Mean and variance of a mixture with ``share`` of ``b``; exactly ``a`` at 0 and ``b`` at 1.

    Args:
        a: mean and variance of the first component.
        b: mean and variance of the second. All arguments broadcast.
        share: weight of ``b``, in [0, 1].
        between: count the variance between the two means (many published rules do not).

    >>> mean, var = mix((torch.zeros(1), torch.ones(1)), (torch.full((1,), 4.0), torch.ones(1)), torch.tensor(0.5))
    >>> float(mean), float(var)
    (2.0, 5.0)
    """
    (mean_a, var_a), (mean_b, var_b) = a, b
    var = torch.lerp(var_a, var_b, share)
    if between:
        var = var + share * (1 - share) * (mean_b - mean_a) ** 2
    return torch.lerp(mean_a, mean_b, share), var


@dataclass(frozen=True)
class WindowStatistics:
    """Window statistics that one update learns from, one row per user.

    Attributes:
        mean: ``[U, C]`` mean over the positions of the windows.
        var: ``[U, C]`` biased variance, over all values if a user has several windows.
        positions: ``[C]`` values per window and channel (1 after a linear layer).
    """

    mean: Tensor
    var: Tensor
    positions: Tensor

    def unbiased(self, weight: Tensor) -> Tensor:
        """Unbiased variance as PyTorch stores it, ``[U, C]``; biased where there is only one value.

        Args:
            weight: ``[U]`` windows per row.
        """
        values = self.positions * weight[:, None]
        return self.var * torch.where(values > 1, values / (values - 1).clamp_min(1e-12), 1.0)


@dataclass(frozen=True)
class State:
    """State of a rule for several users. Some rules keep several sets of moments ("parts", ``P``), e.g. one per class.

    Attributes:
        t: ``[U]`` updates so far.
        n: ``[U, P]`` windows per part.
        mean, var: ``[U, P, C]``.
        classes: ``[U, K]`` posteriors summed over the windows learned from.
        extra: ``[U, E, C]`` values other than moments.
    """

    t: Tensor
    n: Tensor
    mean: Tensor
    var: Tensor
    classes: Tensor
    extra: Tensor

    @property
    def moments(self) -> Pair:
        """Mean and variance of the first part, ``[U, C]``. Most rules have only one."""
        return self.mean[:, 0], self.var[:, 0]

    def diversity(self) -> Tensor:
        r"""``[U]`` in [0, 1]: :math:`(e^{H(q)}-1)/(K-1)` of the classes seen; 0 for at most one class, 1 if uniform."""
        q = self.classes / self.classes.sum(1, keepdim=True).clamp_min(1e-12)
        effective: Tensor = torch.special.entr(q).sum(1).exp()
        return (effective - 1).clamp_min(0) / max(1, q.shape[1] - 1)


@dataclass(frozen=True)
class Prior:
    """Initial statistics of users, and constants of the channels.

    Attributes:
        mean, var: ``[U, C]`` statistics of the source, or those of a calibrated user.
        layer: ``[C]`` index of a channel's layer.
        layers: number of layers of the model.
        eps: ``[C]`` added to variances.
        n0: ``[C]`` weight of the prior in windows, if estimated from the variance between users.
        alpha: ``[C]`` learned weight of the test statistics (`ttn`).
        class_mean, class_var: ``[K, C]`` source moments of each class, if available.
    """

    mean: Tensor
    var: Tensor
    layer: Tensor
    layers: int
    eps: Tensor
    n0: Tensor | None = None
    alpha: Tensor | None = None
    class_mean: Tensor | None = None
    class_var: Tensor | None = None

    @property
    def moments(self) -> Pair:
        """Mean and variance, ``[U, C]``."""
        return self.mean, self.var

    def depth(self) -> Tensor:
        """``[C]`` from 0 (first layer) to 1 (last)."""
        return self.layer.to(self.eps) / max(1, self.layers - 1)

    def per_layer(self, values: Tensor) -> Tensor:
        """Sums over the channels of each layer, ``[..., C]`` to ``[..., layers]``."""
        zeros = values.new_zeros((*values.shape[:-1], self.layers))
        return zeros.index_add(-1, self.layer, values)

    def class_moments(self, rule: str) -> Pair:
        """Class-conditional source moments, ``[K, C]`` each.

        Raises:
            UserError: the prior has none.
        """
        if self.class_mean is None or self.class_var is None:
            raise UserError(
                f"rule {rule!r} needs the source's moments of each class: personalize(model, rule, "
                "prior=source_prior(model, x, y, classes)) with labeled source data"
            )
        return self.class_mean, self.class_var


def map_tensors(value: V, function: Callable[[str, Tensor], Tensor]) -> V:
    """Copy of a `Prior`, `State` or `WindowStatistics` with each tensor replaced by ``function(field, tensor)``."""
    tensors = {f.name: t for f in fields(value) if isinstance(t := getattr(value, f.name), Tensor)}  # type: ignore[arg-type]
    return replace(value, **{name: function(name, t) for name, t in tensors.items()})  # type: ignore[type-var]


def slice_channels(value: V, span: slice) -> V:
    """`Prior`, `State` or `WindowStatistics` of a slice of the channels."""
    constant = ("t", "n", "classes") if isinstance(value, State) else ()
    return map_tensors(value, lambda name, t: t if name in constant else t[..., span])

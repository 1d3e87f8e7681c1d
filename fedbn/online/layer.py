r"""Normalization layer with separate statistics per row, and a forward pass that supplies them.

The layer is independent of users. The current `Pass` supplies a scale and a shift for every row and channel,
:math:`s=\gamma/\sqrt{v+\epsilon}` and :math:`t=\beta-\mu s`, and the output is :math:`y = s x + t`. The operations
are those of PyTorch's kernel, so that a row with the source's statistics gets the source's output to the bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedbn.errors import UserError
from fedbn.nn.batchnorm import AnyBatchNorm
from fedbn.nn.conversion import channels_of
from fedbn.nn.roles import keeps_statistics
from fedbn.online.statistics import Pair, mix


class UserNorm(AnyBatchNorm):
    """BN in evaluation mode. Inside a `Pass`, each row has the scale and shift of its user.

    Attributes:
        index: position among the model's statistics layers, in registration order.
    """

    index: int

    def forward(self, input: Tensor) -> Tensor:
        """Normalized activations, of the input's shape."""
        current = _PASS.get()
        return super().forward(input) if current is None else current.normalize(self, input)


def user_norm(path: str, layer: nn.Module) -> UserNorm | None:
    """New layer in place of a layer with statistics; None for other layers."""
    if not keeps_statistics(layer):
        return None
    affine = getattr(layer, "weight", None) is not None
    return UserNorm(channels_of(layer), eps=float(getattr(layer, "eps", 1e-5)), affine=affine)


def affine_entry(layer: nn.Module, name: str, default: float) -> Tensor:
    """The scale or shift of a layer, ``[C]``; ``default`` for a layer without."""
    value = getattr(layer, name, None)
    return torch.full_like(cast(Tensor, layer.running_mean), default) if value is None else value.detach()


def write_statistics(layer: nn.Module, mean: Tensor, var: Tensor) -> None:
    """Write running statistics into a layer."""
    with torch.no_grad():
        cast(Tensor, layer.running_mean).copy_(mean)
        cast(Tensor, layer.running_var).copy_(var)


Transform = Callable[[int, "Pair | None", int], Pair]
"""Maps a layer's index, the row moments ``[B, C]`` of its input (if recorded) and their number of positions to scale
and shift, ``[B, C]`` or ``[1, C]``."""


@dataclass
class Pass:
    """One forward pass over ``rows`` rows.

    Attributes:
        rows: batch size.
        transform: returns scale and shift of each row.
        record: whether to record row moments.
        mask: ``[B, length]`` False where the last axis is padding, which is excluded from moments. Deeper layers use
            the nearest entry for each of their positions.
        moments: row moments of each layer's input by index, in execution order.
        positions: number of values per row and channel, by index.
    """

    rows: int
    transform: Transform
    record: bool = True
    mask: Tensor | None = None
    moments: dict[int, Pair] = field(default_factory=dict)
    positions: dict[int, int] = field(default_factory=dict)

    def __enter__(self) -> Pass:
        self._token = _PASS.set(self)
        return self

    def __exit__(self, *_: object) -> None:
        _PASS.reset(self._token)

    def normalize(self, layer: UserNorm, x: Tensor) -> Tensor:
        """Output of the layer.

        Raises:
            UserError: the layer's batch size differs from the model's.
        """
        if x.shape[0] != self.rows:
            raise UserError(
                f"a normalization layer received {x.shape[0]} rows for {self.rows} windows: the model folds another "
                "axis into the batch, so rows cannot be assigned to users; keep the batch on axis 0"
            )
        moments = self._record(layer, x) if self.record else None
        scale, shift = self.transform(layer.index, moments, x[0, 0].numel())
        shape = (*scale.shape, *[1] * (x.dim() - 2))
        return torch.addcmul(shift.view(shape), x.to(scale.dtype), scale.view(shape)).to(x.dtype)

    def concatenated(self, widths: Sequence[int], like: Tensor) -> tuple[Pair, Tensor]:
        """Row moments of all layers, and numbers of positions ``[C]``; zeros for layers that did not run.

        Args:
            widths: channels of each layer, by index.
            like: tensor with the type and device of the result.
        """
        zeros = [like.new_zeros(self.rows, width) for width in widths]
        pairs = [self.moments.get(i, (empty, empty)) for i, empty in enumerate(zeros)]
        positions = [like.new_full((width,), self.positions.get(i, 0)) for i, width in enumerate(widths)]
        return (torch.cat([m for m, _ in pairs], 1), torch.cat([v for _, v in pairs], 1)), torch.cat(positions)

    def _record(self, layer: UserNorm, x: Tensor) -> Pair:
        moments = row_moments(x, layer.running_mean, self._layer_mask(x))
        positions = x[0, 0].numel()
        if layer.index in self.moments:  # the layer occurs twice in the network
            before = self.positions[layer.index]
            share = torch.as_tensor(positions / (before + positions), device=x.device)
            self.moments[layer.index] = mix(self.moments[layer.index], moments, share)
            positions += before
        else:
            self.moments[layer.index] = moments
        self.positions[layer.index] = positions
        return moments

    def _layer_mask(self, x: Tensor) -> Tensor | None:
        if self.mask is None or x.dim() < 3:
            return None
        return F.interpolate(self.mask[:, None].to(x), size=x.shape[-1], mode="nearest")[:, 0]


_PASS: ContextVar[Pass | None] = ContextVar("pass", default=None)


def row_moments(x: Tensor, center: Tensor, mask: Tensor | None = None) -> Pair:
    """Mean and biased variance of each row and channel over the positions, ``[B, C]`` each.

    Two plain means about ``center`` avoid cancellation far from zero, and are many times faster than ``torch.var_mean``
    on a CPU.

    Args:
        x: ``[B, C, *positions]``; half precision is measured in float32.
        center: ``[C]``, any values near the mean.
        mask: ``[B, length]`` weights of the positions of the last axis; None: equal weights.

    >>> row_moments(torch.tensor([[[1001.0, 1003.0]]]), torch.tensor([1000.0]))
    (tensor([[1002.]]), tensor([[1.]]))
    """
    dims = list(range(2, x.dim()))
    wide = x.to(torch.promote_types(center.dtype, torch.float32))
    centered = wide - center.view(-1, *[1] * len(dims))
    if not dims:
        return wide, torch.zeros_like(wide)
    if mask is not None:
        share = mask.view(len(x), *[1] * len(dims), -1).expand_as(centered[:, :1])
        share = share / share.sum(dims, keepdim=True)
        offset = (share * centered).sum(dims)
        masked_var = (share * centered.square()).sum(dims) - offset * offset
        # Rows without padding have the same bits as in a batch without padding: other users have no influence.
        whole, mean, var = mask.all(1)[:, None], *row_moments(x, center)
        return torch.where(whole, mean, center + offset), torch.where(whole, var, masked_var.clamp_min(0))
    offset = centered.mean(dims)
    return center + offset, (centered.square_().mean(dims) - offset * offset).clamp_min(0)


def scale_and_shift(mean: Tensor, var: Tensor, eps: Tensor, weight: Tensor, bias: Tensor) -> Pair:
    """Scale s and shift t of :math:`y = s x + t`, rounded as in PyTorch's kernel; arguments broadcast.

    >>> scale_and_shift(torch.tensor(2.0), torch.tensor(4.0), torch.tensor(0.0), torch.tensor(1.0), torch.tensor(0.0))
    (tensor(0.5000), tensor(-1.))
    """
    scale = torch.rsqrt(var + eps) * weight
    return scale, torch.addcmul(bias, mean, scale, value=-1)

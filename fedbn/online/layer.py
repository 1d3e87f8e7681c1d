r"""A normalization layer whose rows may each have their own statistics, and one forward pass through all of them.

The layer knows nothing of users: it asks the `Pass` under way for a scale and a shift of every row and channel,
:math:`s=\gamma/\sqrt{v+\epsilon}` and :math:`t=\beta-\mu s`, and gives :math:`y = s x + t`. Written with the
operations of PyTorch's own kernel, so that a row with the source's statistics gets the source's output to the bit.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor
from torch.nn import functional as F

from fedbn.errors import UserError
from fedbn.nn.batchnorm import AnyBatchNorm
from fedbn.online.statistics import Pair, mix


class UserNorm(AnyBatchNorm):
    """BN in evaluation mode; inside a `Pass`, every row with the scale and shift of its user.

    Attributes:
        place: which of the model's statistics layers it is, in registration order.
    """

    place: int

    def forward(self, input: Tensor) -> Tensor:
        """Normalized activations, of the input's shape."""
        current = _PASS.get()
        return super().forward(input) if current is None else current.normalize(self, input)


Transform = Callable[[int, "Pair | None", int], Pair]
"""From a layer's place, the row moments ``[B, C]`` that it met (if watched) and the number of positions behind them to
its scale and shift, ``[B, C]`` or ``[1, C]``."""


@dataclass
class Pass:
    """One forward pass over ``rows`` rows.

    Attributes:
        rows: of the batch.
        transform: scale and shift of each row.
        watch: whether row moments are measured.
        seen: what each layer met, in the order in which they ran.
        positions: values of a row behind each channel, by place.
        mask: ``[B, length]`` which positions of the last axis are real; the others count in no moments. Deeper layers
            read the nearest entry for each of their positions.
    """

    rows: int
    transform: Transform
    watch: bool = True
    mask: Tensor | None = None
    seen: dict[int, Pair] = field(default_factory=dict)
    positions: dict[int, int] = field(default_factory=dict)

    def __enter__(self) -> Pass:
        self._token = _PASS.set(self)
        return self

    def __exit__(self, *_: object) -> None:
        _PASS.reset(self._token)

    def normalize(self, layer: UserNorm, x: Tensor) -> Tensor:
        """The layer's output.

        Raises:
            UserError: the layer's rows are not the batch's.
        """
        if x.shape[0] != self.rows:
            raise UserError(
                f"a normalization layer met {x.shape[0]} rows where {self.rows} windows were given: the model folds "
                "another axis into the batch, so rows cannot be told apart by user; keep the batch on axis 0"
            )
        moments = self._meet(layer, x) if self.watch else None
        scale, shift = self.transform(layer.place, moments, x[0, 0].numel())
        shape = (*scale.shape, *[1] * (x.dim() - 2))
        return torch.addcmul(shift.view(shape), x.to(scale.dtype), scale.view(shape)).to(x.dtype)

    def _meet(self, layer: UserNorm, x: Tensor) -> Pair:
        now = row_moments(x, cast(Tensor, layer.running_mean), self._real(x))
        positions = x[0, 0].numel()
        if layer.place in self.seen:  # the layer occurs twice in the network
            before = self.positions[layer.place]
            share = torch.as_tensor(positions / (before + positions), device=x.device)
            self.seen[layer.place] = mix(self.seen[layer.place], now, share)
            positions += before
        else:
            self.seen[layer.place] = now
        self.positions[layer.place] = positions
        return now

    def _real(self, x: Tensor) -> Tensor | None:
        if self.mask is None or x.dim() < 3:
            return None
        return F.interpolate(self.mask[:, None].to(x), size=x.shape[-1], mode="nearest")[:, 0]


_PASS: ContextVar[Pass | None] = ContextVar("pass", default=None)


def row_moments(x: Tensor, center: Tensor, real: Tensor | None = None) -> Pair:
    """Mean and biased variance of each row and channel over the positions, ``[B, C]`` each.

    Two plain means about ``center``: where values lie far from zero nothing cancels, and on a CPU it is many times
    as fast as ``torch.var_mean``.

    Args:
        x: ``[B, C, *positions]``; half precision is measured in float32.
        center: ``[C]``, anything near the mean.
        real: ``[B, length]`` weights of the positions of the last axis; None: all alike.

    >>> row_moments(torch.tensor([[[1001.0, 1003.0]]]), torch.tensor([1000.0]))
    (tensor([[1002.]]), tensor([[1.]]))
    """
    dims = list(range(2, x.dim()))
    wide = x.to(torch.promote_types(center.dtype, torch.float32))
    centered = wide - center.view(-1, *[1] * len(dims))
    if not dims:
        return wide, torch.zeros_like(wide)
    if real is not None:
        share = real.view(len(x), *[1] * len(dims), -1).expand_as(centered[:, :1])
        share = share / share.sum(dims, keepdim=True)
        offset = (share * centered).sum(dims)
        spread = (share * centered.square()).sum(dims) - offset * offset
        # Rows without padding to the same bits as in a batch without: what is another user's changes nothing here.
        whole, mean, var = real.all(1)[:, None], *row_moments(x, center)
        return torch.where(whole, mean, center + offset), torch.where(whole, var, spread.clamp_min(0))
    offset = centered.mean(dims)
    return center + offset, (centered.square_().mean(dims) - offset * offset).clamp_min(0)


def scale_and_shift(mean: Tensor, var: Tensor, eps: Tensor, weight: Tensor, bias: Tensor) -> Pair:
    """Factor s and summand t of :math:`y = s x + t`, rounded as in PyTorch's kernel; arguments broadcast.

    >>> scale_and_shift(torch.tensor(2.0), torch.tensor(4.0), torch.tensor(0.0), torch.tensor(1.0), torch.tensor(0.0))
    (tensor(0.5000), tensor(-1.))
    """
    scale = torch.rsqrt(var + eps) * weight
    return scale, torch.addcmul(bias, mean, scale, value=-1)

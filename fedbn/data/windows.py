"""Cut a recording into windows of equal length."""

from __future__ import annotations

from torch import Tensor

from fedbn.errors import UserError


def hop(window: int, overlap: float) -> int:
    """Number of samples from the start of one window to the start of the next.

    Raises:
        UserError: if the window has fewer than 8 samples, or the overlap is not in [0, 1).

    >>> hop(128, 0.5)
    64
    """
    if window < 8:
        raise UserError(f"window={window} is too short for a pattern; choose 8 samples or more")
    if not 0 <= overlap < 1:
        raise UserError(f"overlap={overlap} must be at least 0 and below 1, for instance 0.5")
    return max(1, round(window * (1 - overlap)))


def windows(signal: Tensor, window: int, step: int) -> Tensor:
    """All complete windows of ``signal``: ``[rows, channels]`` to ``[n, channels, window]``; ``n`` may be 0.

    >>> import torch
    >>> windows(torch.arange(5.0)[:, None], 3, 2)[:, 0]
    tensor([[0., 1., 2.],
            [2., 3., 4.]])
    """
    if len(signal) < window:
        return signal.new_zeros(0, signal.shape[1], window)
    return signal.unfold(0, window, step).contiguous()

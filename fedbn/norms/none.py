"""No normalization: the control."""

from __future__ import annotations

from torch import nn

from fedbn.nn.conversion import replace_norms, require_norms


def convert(model: nn.Module) -> nn.Module:
    """The identity for every normalization layer; nothing else changes, biases neither.

    >>> convert(nn.Sequential(nn.BatchNorm1d(4)))[0]
    Identity()
    """
    require_norms(model, "conversion to none")
    return replace_norms(model, lambda _path, _layer: nn.Identity())

"""No normalization, as a control."""

from __future__ import annotations

from torch import nn

from fedbn.nn.conversion import remove_norms, require_norms


def convert(model: nn.Module) -> nn.Module:
    """Replace every normalization layer by the identity; everything else, including biases, stays.

    >>> convert(nn.Sequential(nn.BatchNorm1d(4)))[0]
    Identity()
    """
    require_norms(model, "conversion to none")
    return remove_norms(model)

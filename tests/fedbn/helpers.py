"""Helpers shared by the tests of the library."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from fedbn.errors import UserError
from fedbn.models.small_cnn import SmallCNN


def rejects(message, function, *args, **options):
    """Assert that a call raises a `UserError` whose text matches ``message``."""
    with pytest.raises(UserError, match=message):
        function(*args, **options)


def draw(*shape, seed=0):
    """Normally distributed values with mean 1 and standard deviation 2, float64."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2 + 1


def network(seed=0):
    """A small CNN for images ``[1, 8, 8]``, float64."""
    torch.manual_seed(seed)
    return SmallCNN((1, 8, 8), 10).double()


def trained(layer, seed=0):
    """A layer in float64 with statistics, scale and shift that are not the initial ones."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for t in (layer.double().running_mean, layer.running_var, layer.weight, layer.bias):
            t.copy_(torch.rand(t.shape, generator=generator, dtype=torch.float64) + 0.5)
    return layer


def bn_eval(layer, x):
    """Batch normalization of ``x`` by the running statistics of ``layer``."""
    return F.batch_norm(x, layer.running_mean, layer.running_var, layer.weight, layer.bias, eps=layer.eps)

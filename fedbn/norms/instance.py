"""Instance normalization (Ulyanov, Vedaldi, Lempitsky, 2016, https://arxiv.org/abs/1607.08022)."""

from __future__ import annotations

from functools import partial

from fedbn.nn.batchnorm import AnyInstanceNorm
from fedbn.nn.conversion import convert_norms

convert = partial(convert_norms, cls=AnyInstanceNorm, kind="instance")
"""Normalize each channel of each sample over its positions, without running statistics."""

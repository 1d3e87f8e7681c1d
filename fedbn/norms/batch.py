"""Batch normalization (Ioffe, Szegedy, ICML 2015, https://arxiv.org/abs/1502.03167)."""

from __future__ import annotations

from functools import partial

from fedbn.nn.batchnorm import AnyBatchNorm
from fedbn.nn.conversion import convert_norms

convert = partial(convert_norms, cls=AnyBatchNorm, kind="batch")
"""Replace BN, or GroupNorm in a model without BN, by BN for any number of axes. Statistics are copied from BN."""

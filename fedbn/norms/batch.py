"""Batch normalization (Ioffe, Szegedy, ICML 2015, https://arxiv.org/abs/1502.03167)."""

from __future__ import annotations

from functools import partial

from fedbn.nn.batchnorm import AnyBatchNorm
from fedbn.nn.conversion import convert_norms

convert = partial(convert_norms, cls=AnyBatchNorm, kind="batch")
"""Replace every normalization layer by BN. Statistics are copied from layers that have them."""

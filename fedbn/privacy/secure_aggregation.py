r"""Sums over clients that show nobody's part: fixed-point numbers and masks that cancel, modulo :math:`2^{64}`.

A client sends :math:`w`, its weighted update of parameters and its weighted shifted sums of statistics, each rounded
to ``bits`` binary digits after the point and taken modulo :math:`2^{64}`, plus a mask for each other client of the
round: what one of a pair adds, the other subtracts. A message alone is uniformly distributed; the sum of all is the sum
of what was encoded, exactly. Moments are sums, so pooling needs nothing else. What would not fit is an error:
clipping it silently, as quantisers with a fixed range do, destroys running variances.

After Bonawitz et al., 2017, https://doi.org/10.1145/3133956.3133982. Their key agreement and recovery from
clients that drop out are not here: masks come from the run's seed, and a round without every reply is an error.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedbn.errors import UserError
from fedbn.seeds import numpy_generator

Words = NDArray[np.uint64]


def encode(values: Tensor, bits: int, clients: int) -> Words:
    """Numbers as integers modulo 2^64, so that a sum over ``clients`` cannot run over.

    >>> encode(torch.tensor([-0.5, 2.0]), bits=8, clients=3)
    array([18446744073709551488,                  512], dtype=uint64)

    Raises:
        UserError: a number that is not finite or too large.
    """
    limit = 2.0 ** (62 - bits) / clients
    largest = float(values.abs().max()) if len(values) else 0.0
    if not largest <= limit:
        raise UserError(
            f"privacy: {largest:g} does not fit a secure sum of {clients} clients with {bits} bits after the point "
            f"(at most {limit:g}): choose fewer bits, or a lower learning rate"
        )
    return np.rint(values.double().numpy() * 2.0**bits).astype(np.int64).view(np.uint64)


def decode(words: Words, bits: int) -> Tensor:
    """A sum of encoded numbers, float64.

    >>> decode(encode(torch.tensor([-0.5, 2.0]), 8, 1), 8)
    tensor([-0.5000,  2.0000], dtype=torch.float64)
    """
    return torch.from_numpy(words.view(np.int64) / 2.0**bits)


def total(messages: Sequence[Words]) -> Words:
    """The sum modulo 2^64."""
    return np.sum(np.stack(messages), axis=0, dtype=np.uint64)


def mask(user: int, others: Sequence[int], size: int, seed: int, round: int) -> Words:
    """What a client adds to its message; over all clients of a round it sums to zero modulo 2^64."""
    out = np.zeros(size, dtype=np.uint64)
    for other in others:
        if other != user:
            draw = numpy_generator(seed, "mask", round, min(user, other), max(user, other))
            words = draw.integers(0, 2**64, size, dtype=np.uint64)
            out = out + words if user < other else out - words
    return out

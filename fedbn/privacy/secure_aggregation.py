r"""Secure sums over clients: fixed-point numbers with pairwise masks that cancel, modulo :math:`2^{64}`.

A client sends its weight :math:`w`, its weighted parameter update and its weighted shifted sums of statistics. Each
number is rounded to ``bits`` fractional bits, taken modulo :math:`2^{64}`, and masked once for every other client of
the round: one client of a pair adds the mask, the other subtracts it. A single message is uniformly distributed; the
sum of all messages is exactly the sum of the encoded numbers. Moments are sums, so pooling needs nothing else. Numbers
that do not fit are an error, because silent clipping, as in quantizers with a fixed range, destroys running variances.

After Bonawitz et al., 2017, https://doi.org/10.1145/3133956.3133982. Their key agreement and
dropout recovery are not implemented: masks come from the run's seed, and a missing reply is an error.
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
    """Encode numbers as integers modulo 2^64 such that a sum over ``clients`` cannot overflow.

    >>> encode(torch.tensor([-0.5, 2.0]), bits=8, clients=3)
    array([18446744073709551488,                  512], dtype=uint64)

    Raises:
        UserError: a number that is not finite or too large.
    """
    limit = 2.0 ** (62 - bits) / clients
    largest = float(values.abs().max()) if len(values) else 0.0
    if not largest <= limit:
        raise UserError(
            f"privacy: {largest:g} does not fit a secure sum of {clients} clients with {bits} fractional bits "
            f"(at most {limit:g}): choose fewer bits, or a lower learning rate"
        )
    return np.rint(values.double().numpy() * 2.0**bits).astype(np.int64).view(np.uint64)


def decode(words: Words, bits: int) -> Tensor:
    """Decode a sum of encoded numbers to float64.

    >>> decode(encode(torch.tensor([-0.5, 2.0]), 8, 1), 8)
    tensor([-0.5000,  2.0000], dtype=torch.float64)
    """
    return torch.from_numpy(words.view(np.int64) / 2.0**bits)


def modular_sum(messages: Sequence[Words]) -> Words:
    """Sum of messages modulo 2^64."""
    return np.sum(np.stack(messages), axis=0, dtype=np.uint64)


def pairwise_mask(user: int, others: Sequence[int], size: int, seed: int, round: int | str) -> Words:
    """Mask that a client adds to its message; the masks of all clients of a round sum to 0 modulo 2^64.

    ``round`` is the number or name of the round; no two sums may share it.
    """
    out = np.zeros(size, dtype=np.uint64)
    for other in others:
        if other != user:
            draw = numpy_generator(seed, "mask", round, min(user, other), max(user, other))
            words = draw.integers(0, 2**64, size, dtype=np.uint64)
            out = out + words if user < other else out - words
    return out

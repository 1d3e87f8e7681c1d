"""Randomness keyed by purpose: the same words give the same numbers, whatever ran before."""

from __future__ import annotations

import hashlib

import numpy as np
import torch


def key(seed: int, *path: object) -> int:
    """A 63-bit number determined by ``seed`` and the words of ``path`` alone.

    >>> key(0, "round", 3) == key(0, "round", 3), key(0, "round", 3) == key(0, "round", 4)
    (True, False)
    """
    text = "/".join([str(seed), *map(str, path)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def generator(seed: int, *path: object) -> torch.Generator:
    """A torch generator for one purpose, e.g. ``generator(seed, "shuffle", round, user)``."""
    return torch.Generator().manual_seed(key(seed, *path))


def numpy_generator(seed: int, *path: object) -> np.random.Generator:
    """The same for NumPy."""
    return np.random.default_rng(key(seed, *path))

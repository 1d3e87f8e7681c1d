"""Random numbers keyed by purpose: the same key always gives the same numbers, independent of earlier draws."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def key(seed: int, *path: object) -> int:
    """A 63-bit number that depends only on ``seed`` and the parts of ``path``.

    >>> key(0, "round", 3) == key(0, "round", 3), key(0, "round", 3) == key(0, "round", 4)
    (True, False)
    """
    text = "/".join([str(seed), *map(str, path)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def generator(seed: int, *path: object, reuse: torch.Generator | None = None) -> torch.Generator:
    """A PyTorch generator for one purpose, e.g. ``generator(seed, "shuffle", round, user)``.

    A generator to ``reuse`` starts again with this seed, which is faster than a new one.
    """
    return (reuse or torch.Generator()).manual_seed(key(seed, *path))


def numpy_generator(seed: int, *path: object) -> np.random.Generator:
    """A NumPy generator for one purpose."""
    return np.random.default_rng(key(seed, *path))


@contextmanager
def seeded(seed: int, *path: object) -> Iterator[None]:
    """Context in which PyTorch's global generator is seeded for one purpose; its CPU state is restored afterwards.

    >>> with seeded(0, "initial weights"):
    ...     first = torch.rand(1)
    >>> with seeded(0, "initial weights"):
    ...     bool(torch.rand(1) == first)
    True
    """
    with torch.random.fork_rng(devices=[]):
        seed_torch(key(seed, *path))
        yield


def seed_torch(value: int) -> None:
    """Seed PyTorch's global generators.

    On a machine without an accelerator, this seeds the CPU's generator only: `torch.manual_seed` formats a stack trace
    for every kind of device that may be initialized later, which takes longer than a training step of a small network.
    """
    if torch.accelerator.is_available():
        torch.manual_seed(value)
    else:
        torch.default_generator.manual_seed(value)

"""Versions and digests of the code that computed a result."""

from __future__ import annotations

import hashlib
from functools import cache
from importlib.metadata import version
from pathlib import Path

import fedbn
import fedbn_clients
from fedbn.errors import UserError

NUMERICS = 3
"""Version of the numerical results of `fedbn` and `fedbn_clients`.

Version 3: `dirichlet`, `pathological` and `shard` shuffle the rows before they assign them, and `digits` shuffles the
training rows of a domain, so that a part of them is a random sample.

Increment it whenever results change, that is, whenever a golden curve or a test of bit equality has to be updated.
Stored results of another version are rejected.
"""

PACKAGES = ("fedbn", "flwr", "torch", "numpy", "scikit-learn", "flwr-datasets")


@cache
def versions() -> dict[str, str]:
    """Versions of the packages that influence results."""
    return {name: version(name) for name in PACKAGES}


@cache
def code_digest() -> str:
    """Digest of the source of `fedbn` and `fedbn_clients`, stored with results as provenance (see `NUMERICS`)."""
    digest = hashlib.sha256()
    for package in (fedbn, fedbn_clients):
        root = Path(str(package.__file__)).parent
        for path in sorted(root.rglob("*.py")):
            digest.update(str(path.relative_to(root)).encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def check_numerics(path: Path, stored: object) -> None:
    """Check that a stored result was computed with the current numerics.

    Args:
        path: the file or directory, for the message.
        stored: its ``numerics`` field.

    Raises:
        UserError: the version differs or is missing.
    """
    if stored != NUMERICS:
        raise UserError(
            f"{path} was computed with other numerics (version {stored}, now {NUMERICS}): use the version of fedbn "
            "that wrote it, or start again with another --out"
        )

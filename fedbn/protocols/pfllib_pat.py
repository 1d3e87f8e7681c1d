"""PFLlib with a few classes per client (*pathological*)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fedbn.protocols.base import Published
from fedbn.protocols.pfllib_dir import CLIENTS, PfllibDir


@dataclass(frozen=True)
class PfllibPat(PfllibDir):
    """As ``pfllib-dir``, with two classes per client; the same options."""

    name: ClassVar[str] = "pfllib-pat"
    about: ClassVar[str] = "PFLlib: 20 clients with two classes each, own tests"
    differs: ClassVar[tuple[str, ...]] = (
        PfllibDir.differs[0],
        "partition: a client's second class is random and a class is divided equally, while PFLlib takes successive "
        "classes and random sizes",
        PfllibDir.differs[2],
    )

    published: ClassVar[tuple[Published, ...]] = (
        Published("nonorm", "80.41 ± 0.08 % (FedAvg, Fashion-MNIST)", "docs/benchmark.html, pathological label skew"),
    )
    partition: ClassVar[str] = f"pathological:classes=2:clients={CLIENTS}"

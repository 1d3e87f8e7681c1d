"""FixBN's CIFAR-10."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from fedbn.protocols.base import Protocol, with_path


@dataclass(frozen=True)
class Fixbn(Protocol):
    """CIFAR-10 with ResNet-20.

    Attributes:
        path: directory of the binary version of CIFAR-10.
    """

    name: ClassVar[str] = "fixbn"
    about: ClassVar[str] = "FixBN: CIFAR-10 with ResNet-20 (setting known in part)"
    source: ClassVar[str] = "Zhong, Chen, Chao, FixBN, 2023, https://arxiv.org/abs/2303.06530; abstract only"
    differs: ClassVar[tuple[str, ...]] = (
        "partition and plan: not verified in the paper, so Dirichlet 0.1 and the defaults of scenario cifar are used",
    )

    path: str = ""

    @property
    def settings(self) -> dict[str, Any]:
        return {
            "scenario": with_path("cifar:unseen=0", self.path),
            "partition": "dirichlet:alpha=0.1:clients=20",
            "model": "resnet20",
        }

"""HBN's CIFAR-10: small batches, and learning rates per normalization."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from fedbn.protocols.base import Protocol, with_path


@dataclass(frozen=True)
class Hbn(Protocol):
    """100 clients with label skew, ten of which train in a round, with batches of four.

    Attributes:
        path: directory of the binary version of CIFAR-10.
    """

    name: ClassVar[str] = "hbn"
    about: ClassVar[str] = "HBN: 100 clients of CIFAR-10, 10 % per round, batches of 4"
    source: ClassVar[str] = (
        "Chen, Xu, Wu, Kittler, HBN, ICML 2025, https://arxiv.org/abs/2505.21877; README and defaults of "
        "Hongyao-Chen/HybridBN"
    )
    differs: ClassVar[tuple[str, ...]] = ("model: ResNet-20; the network of the paper was not verified",)

    path: str = ""

    @property
    def settings(self) -> dict[str, Any]:
        return {
            "scenario": with_path("cifar:unseen=0", self.path),
            "partition": "dirichlet:alpha=0.6:clients=100",
            "model": "resnet20",
            "rounds": 500,
            "clients_per_round": 10,
            "local_epochs": 1,
            "batch_size": 4,
            "lr": 0.01,
            "rates": {"fixbn": 0.002} | dict.fromkeys(("groupnorm", "layernorm", "feature-norm"), 0.005),
            "schedule": "step:every=1:factor=0.998",
            "momentum": 0.9,
            "max_grad_norm": 10.0,
        }

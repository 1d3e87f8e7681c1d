"""FedTAN's CIFAR-10 with two classes per client."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from fedbn.protocols.base import Protocol, with_path


@dataclass(frozen=True)
class Fedtan(Protocol):
    """Five clients with two classes each.

    Attributes:
        path: directory of the binary version of CIFAR-10.
    """

    name: ClassVar[str] = "fedtan"
    about: ClassVar[str] = "FedTAN: 5 clients of CIFAR-10 with two classes each"
    source: ClassVar[str] = (
        "Wang, Shi, Chang, FedTAN, 2023, https://arxiv.org/abs/2301.02982; defaults of the code in wangyanmeng/FedTAN"
    )
    differs: ClassVar[tuple[str, ...]] = (
        "rounds: one local epoch (79 steps) instead of 5 steps, so 633 rounds have the steps of 10,000",
    )

    path: str = ""

    @property
    def settings(self) -> dict[str, Any]:
        return {
            "scenario": with_path("cifar:unseen=0", self.path),
            "partition": "shard:shards=2:clients=5",
            "model": "resnet20",
            "rounds": 633,
            "local_epochs": 1,
            "batch_size": 128,
            "lr": 0.5,
            "schedule": "step:every=380:factor=0.1",
            "momentum": 0.9,
            "weight_decay": 1e-4,
            "weighting": "uniform",
        }

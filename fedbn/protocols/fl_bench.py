"""FL-bench with its default configuration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from fedbn.errors import UserError
from fedbn.protocols.base import Protocol, with_path


@dataclass(frozen=True)
class FlBench(Protocol):
    """20 clients of MNIST with label skew, two of which train in a round.

    Attributes:
        alpha: concentration of the Dirichlet distribution, which the source leaves to the user.
        path: directory of the files of MNIST; empty to find them.
    """

    name: ClassVar[str] = "fl-bench"
    about: ClassVar[str] = "FL-bench: 20 clients of MNIST, 10 % per round, own tests"
    source: ClassVar[str] = (
        "Tan, Wang, FL-bench, https://github.com/KarhouTam/FL-bench; defaults of config/defaults.yaml and "
        "generate_data.py"
    )
    differs: ClassVar[tuple[str, ...]] = ("model: a CNN with BN instead of LeNet-5, which has none",)

    alpha: float = 0.1
    path: str = ""

    @property
    def settings(self) -> dict[str, Any]:
        if not self.alpha > 0:
            raise UserError(f"alpha={self.alpha:g}: choose a concentration above 0")
        return {
            "scenario": with_path("idx:data=mnist:split=pooled:users=1:unseen=0", self.path),
            "partition": f"dirichlet:alpha={self.alpha:g}:clients=20:least=40",
            "model": "image-cnn",
            "rounds": 100,
            "clients_per_round": 2,
            "local_epochs": 5,
            "batch_size": 32,
            "lr": 0.01,
            "momentum": 0.0,
            "eval_every": 100,
        }

"""PFLlib with label skew drawn from a Dirichlet distribution."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from fedbn.errors import UserError
from fedbn.protocols.base import Protocol, Published, with_path

CLIENTS = 20


@dataclass(frozen=True)
class PfllibDir(Protocol):
    """20 clients, each with a test part of its own data.

    Attributes:
        data: data set of scenario ``idx``, or ``cifar``.
        path: directory of its files, as in the scenario; empty to find them.
        join: fraction of the clients that train in a round, in (0, 1]; the library's papers use 1 and 0.1.
    """

    name: ClassVar[str] = "pfllib-dir"
    about: ClassVar[str] = "PFLlib: 20 clients, Dirichlet 0.1, own tests"
    source: ClassVar[str] = (
        "Zhang, Liu, Hua, Wang, Song, Xue, Ma, Guan, PFLlib, 2023, https://arxiv.org/abs/2312.04992; "
        "defaults of system/main.py and dataset/utils/dataset_utils.py"
    )
    differs: ClassVar[tuple[str, ...]] = (
        "model: a CNN with BN instead of PFLlib's, which has none",
        "partition: a client can get more than its equal share of rows, which PFLlib prevents, and has at least 2 rows",
        "reported: the last round instead of the best round on test data",
    )

    published: ClassVar[tuple[Published, ...]] = (
        Published("nonorm", "85.85 ± 0.19 % (FedAvg, Fashion-MNIST)", "docs/benchmark.html, practical label skew"),
    )
    partition: ClassVar[str] = f"dirichlet:alpha=0.1:clients={CLIENTS}:least=2"

    data: str = "fashion-mnist"
    path: str = ""
    join: float = 1.0

    @property
    def settings(self) -> dict[str, Any]:
        if not 0 < self.join <= 1:
            raise UserError(f"join={self.join:g}: choose the fraction of clients per round, above 0 and at most 1")
        data = "cifar" if self.data == "cifar" else f"idx:data={self.data}"
        return {
            "scenario": with_path(f"{data}:split=pooled:users=1:unseen=0", self.path),
            "partition": self.partition,
            "model": "image-cnn",
            "rounds": 2000,
            "clients_per_round": None if self.join == 1 else max(1, round(self.join * CLIENTS)),
            "local_epochs": 1,
            "batch_size": 10,
            "lr": 0.005,
            "momentum": 0.0,
        }

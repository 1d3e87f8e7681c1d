"""LEAF's FEMNIST: handwritten characters, each writer is a client."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from fedbn.errors import UserError
from fedbn.protocols.base import Protocol, with_path

SIZES = {"small": (30, 10), "medium": (100, 10), "large": (400, 20)}
"""Rounds, and rounds between evaluations."""


@dataclass(frozen=True)
class LeafFemnist(Protocol):
    """Writers as clients, two of whom train in a round.

    Attributes:
        size: ``small``, ``medium`` or ``large``: the number of rounds.
        users: number of writers.
        path: local copy of the data set, as in scenario ``hub``; empty to load it from the hub.
    """

    name: ClassVar[str] = "leaf-femnist"
    about: ClassVar[str] = "LEAF: writers of FEMNIST, two per round"
    source: ClassVar[str] = (
        "Caldas et al., LEAF, 2018, https://arxiv.org/abs/1812.01097; defaults of models/baseline_constants.py and "
        "models/utils/args.py"
    )
    differs: ClassVar[tuple[str, ...]] = ("model: a CNN with BN instead of LEAF's, which has none",)

    size: str = "small"
    users: int = 100
    path: str = ""

    @property
    def settings(self) -> dict[str, Any]:
        if self.size not in SIZES:
            raise UserError(f"size={self.size}: choose {', '.join(SIZES)}")
        rounds, every = SIZES[self.size]
        return {
            "scenario": with_path(f"hub:data=femnist:users={self.users}:unseen=0", self.path),
            "model": "image-cnn",
            "rounds": rounds,
            "eval_every": every,
            "clients_per_round": 2,
            "local_epochs": 1,
            "batch_size": 10,
            "lr": 0.0003,
            "momentum": 0.0,
        }

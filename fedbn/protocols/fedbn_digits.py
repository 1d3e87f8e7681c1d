"""FedBN's digits: five data sets of digits, one client each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from fedbn.errors import UserError
from fedbn.protocols.base import Protocol, with_path


@dataclass(frozen=True)
class FedbnDigits(Protocol):
    """743 training images per client; all clients train in every round.

    Attributes:
        data: ``digits`` for the six packaged domains, which need no download, or ``digits-five`` for the paper's.
        path: directory of the archives that the hub does not have, for ``digits-five`` (scenario ``hub``).
    """

    name: ClassVar[str] = "fedbn-digits"
    about: ClassVar[str] = "FedBN: one client per domain of digits, 743 images each"
    source: ClassVar[str] = (
        "Li, Jiang, Zhang, Kamp, Dou, FedBN, ICLR 2021, https://arxiv.org/abs/2102.07623; "
        "federated/fed_digits.py and utils/data_preprocess.py of med-air/FedBN"
    )
    differs: ClassVar[tuple[str, ...]] = (
        "data: digits has six other domains; digits-five has the published training and test parts, not a new split",
    )

    data: str = "digits"
    path: str = ""

    @property
    def settings(self) -> dict[str, Any]:
        scenarios = {"digits": "digits:unseen=0", "digits-five": "hub:data=digits-five:limit=743:unseen=0"}
        if self.data not in scenarios:
            raise UserError(f"data={self.data}: choose {' or '.join(scenarios)}")
        return {
            "scenario": with_path(scenarios[self.data], self.path),
            "model": "digit-cnn",
            "rounds": 100,
            "local_epochs": 1,
            "batch_size": 32,
            "lr": 0.01,
            "momentum": 0.0,
            "weighting": "uniform",
        }

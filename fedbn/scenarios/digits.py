"""Digits: one task, six domains, one client per domain, the setting in which FedBN was proposed.

Li, Jiang, Zhang, Kamp, Dou, *FedBN: Federated Learning on Non-IID Features via Local Batch Normalization*,
ICLR 2021, https://arxiv.org/abs/2102.07623, train one client per data set on 743 images each. Their five data sets need
a download; the six of `fedbn.scenarios.glyphs` do not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from fedbn.scenarios.digit_domains import DigitScenario, Part, pixels
from fedbn.scenarios.glyphs import Domain


@dataclass(frozen=True)
class Digits(DigitScenario):
    """Images ``[3, 28, 28]`` in [-1, 1], 10 classes; options as in `DigitScenario`."""

    name: ClassVar[str] = "digits"
    about: ClassVar[str] = "digits in 6 domains, one client each (FedBN's setting)"
    model: ClassVar[str] = "digit-cnn"
    plan: ClassVar[dict[str, object]] = {"rounds": 30, "local_epochs": 1, "batch_size": 32, "lr": 0.01, "momentum": 0.0}

    def examples(self, domain: Domain, rows: np.ndarray, part: Part) -> tuple[Tensor, Tensor]:
        x = pixels(domain.images[rows]).expand(-1, 3, -1, -1).contiguous()
        return x, torch.from_numpy(domain.labels[rows].astype(np.int64))

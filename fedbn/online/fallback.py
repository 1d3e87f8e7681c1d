r"""Answer with the source model while label-free evidence is against a user's alignment.

With the densities of the classes that the federation knows (`fedbn.online.alignments.base`), a window with summaries
:math:`z_t` is evidence for the transformation :math:`\theta_t` that was estimated from the windows before it, of

.. math:: \ell_t=\log\frac{\sum_k N(\theta_t z_t;\mu_k,\Sigma_k)}{\sum_k N(z_t;\mu_k,\Sigma_k)},\qquad
          L_t=(1-1/m)\,L_{t-1}+\operatorname{clip}(\ell_t,-c,c).

This is the prequential likelihood ratio against the identity (Dawid, 1984, *Statistical theory: the prequential
approach*) with forgetting. As b successive windows count as one independent window, the user gets the answers of the
source model while :math:`L/b<-\log 20`. The statistics and the alignment learn on, so that the user returns to them
when the evidence does.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from fedbn.errors import UserError
from fedbn.nn.inference import logits
from fedbn.online.alignments.base import Aligner
from fedbn.online.personalized import Personalized

LARGEST = 10.0
"""Largest evidence c of one window, in nats, so that a single strange window does not decide."""

AGAINST = math.log(20)
"""Evidence against the alignment, in nats per independent window, from which the source answers: odds of 20 to 1."""


@dataclass(frozen=True)
class Fallback:
    """Options of a `FallbackModel`.

    Attributes:
        memory: m, windows after which the weight of a window has fallen to about 1/e.
    """

    name: ClassVar[str] = "fallback"
    about: ClassVar[str] = "answer as the source while label-free evidence is against the alignment"
    memory: float = 50.0

    def __post_init__(self) -> None:
        if self.memory < 1:
            raise UserError(f"'fallback': memory must be at least 1, not {self.memory:g}")


def log_ratio(aligner: Aligner, value: Tensor, z: Tensor) -> Tensor:
    """Log likelihood ratio ``[B]`` of summaries ``[B, D]`` under parameters ``[B, P]`` against the identity."""
    value = value.to(z)
    values = torch.stack([value, aligner.identity.to(z).expand_as(value)], 1)
    found = aligner.estimator.likelihood(z.new_ones(len(z), 1), z[:, None], values)
    return aligner.alignment.b * (found[:, 0] - found[:, 1])


@dataclass
class FallbackModel:
    """Wraps a personalized model with an alignment: predicts and learns as ``net`` does, unless evidence is against it.

    Attributes:
        net: the personalized model.
        model: the source model.
        options: how fast evidence is forgotten.
        evidence: L of each user, in nats.
        windows: number of windows that the source answered, by user.

    Raises:
        UserError: the personalized model has no alignment.
    """

    net: Personalized
    model: nn.Module
    options: Fallback = field(default_factory=Fallback)
    evidence: dict[str, float] = field(default_factory=dict)
    windows: dict[str, int] = field(default_factory=dict)
    _ratio: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.net.bank.aligner is None:
            raise UserError("'fallback' weighs an alignment against the identity: name one, e.g. rotation/fallback")

    def predict(self, x: Tensor, user: Sequence[str]) -> Tensor:
        """Outputs ``[B, classes]`` of the wrapped model, or of the source for users with evidence against it.

        Args:
            x: windows ``[B, *shape]``.
            user: a different user for each window.
        """
        bank = self.net.bank
        aligner, slots = bank.aligner, bank.group(user, create=False).slots
        assert aligner is not None
        z, usable = aligner.measure(x)
        ratio = log_ratio(aligner, bank.rows["align_value"][slots], z).clamp(-LARGEST, LARGEST)
        self._ratio = dict(zip(user, torch.where(usable, ratio, 0.0).tolist(), strict=True))
        out = self.net.predict(x, user=user)
        least = -AGAINST * aligner.alignment.b
        rejected = [i for i, name in enumerate(user) if self.evidence.get(name, 0.0) < least]
        if rejected:
            out = out.clone()
            out[rejected] = logits(self.model, x[rejected]).to(out)
        for i in rejected:
            self.windows[user[i]] = self.windows.get(user[i], 0) + 1
        return out

    def commit(self, posterior: Tensor | None = None) -> None:
        """Update the wrapped model, then the evidence."""
        self.net.commit(posterior=posterior)
        keep = 1 - 1 / self.options.memory
        for name, ratio in self._ratio.items():
            self.evidence[name] = keep * self.evidence.get(name, 0.0) + ratio
        self._ratio = {}

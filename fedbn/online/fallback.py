"""Answer with the source model while label-free evidence is against a user's alignment.

The evidence is the prequential likelihood ratio of `fedbn.online.alignments.aligner.Aligner.evidence`. It is part of
the user's state. The statistics and the alignment learn on, so that the user returns to them when the evidence does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from fedbn.errors import UserError
from fedbn.nn.inference import logits
from fedbn.online.personalized import Personalized


@dataclass(frozen=True)
class Fallback:
    """The monitor of a `FallbackModel`, as part of the text of a method. It has no options."""

    name: ClassVar[str] = "fallback"
    about: ClassVar[str] = "answer as the source while label-free evidence is against the alignment"


@dataclass
class FallbackModel:
    """Wraps a personalized model with an alignment: predicts and learns as ``net`` does, unless evidence is against it.

    Attributes:
        net: the personalized model.
        model: the source model.
        windows: number of windows that the source answered, by user.

    Raises:
        UserError: the personalized model has no alignment.
    """

    net: Personalized
    model: nn.Module
    windows: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.net.bank.aligner is None:
            raise UserError("'fallback' weighs an alignment against the identity: name one, e.g. rotation/fallback")

    def predict(self, x: Tensor, user: Sequence[str]) -> Tensor:
        """Outputs ``[B, classes]`` of the wrapped model, or of the source for users with evidence against it.

        Args:
            x: windows ``[B, *shape]``.
            user: user of each window.
        """
        bank, out = self.net.bank, self.net.predict(x, user=user)
        assert bank.aligner is not None
        group = bank.group(user, create=False)
        rejected = bank.aligner.rejected(bank.rows, group.slots)[group.row]
        if rejected.any():
            out = torch.where(rejected[:, None], logits(self.model, x).to(out), out)
            for i in rejected.nonzero()[:, 0].tolist():
                self.windows[user[i]] = self.windows.get(user[i], 0) + 1
        return out

    def commit(self, posterior: Tensor | None = None, weight: Tensor | None = None) -> None:
        """Update the wrapped model, and with it the evidence; see `Personalized.commit`."""
        self.net.commit(posterior=posterior, weight=weight)

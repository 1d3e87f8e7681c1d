"""Inference in evaluation mode."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def logits(model: nn.Module, x: Tensor, chunk: int = 512) -> Tensor:
    """Evaluation-mode outputs ``[n, classes]`` without gradients, computed ``chunk`` rows at a time."""
    model.eval()
    with torch.no_grad():
        return torch.cat([model(rows) for rows in x.split(chunk)])

"""Difference between the outputs of a model under the statistics of a batch and under those that it is served with.

Clients train with batch statistics. The served model was never trained on features that averaged statistics produce.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from fedbn.nn.inference import logits
from fedbn.nn.roles import clone, statistics_layers

LARGE_GAP = 0.03
"""Difference between the accuracies from which a warning is shown."""

REMEDY = (
    "freeze the statistics late (fixbn:stage1=0.75), recalibrate them (global-recalibrated), augment training "
    "data, or adapt with a matched head (+matched)"
)
"""What makes the difference smaller."""


def train_statistics(model: nn.Module) -> None:
    """Use batch statistics in every layer with statistics, in place; other layers stay in evaluation mode."""
    model.eval()
    for layer in statistics_layers(model).values():
        layer.train()


def outputs_in_both_modes(
    model: nn.Module, x: Tensor, batch_size: int, set_training_mode: Callable[[nn.Module], None] = train_statistics
) -> tuple[Tensor, Tensor]:
    """Outputs under batch statistics and under the served ones, without dropout; the model is not changed.

    Args:
        model: the served model.
        x: examples ``[n, *shape]``, in random order.
        batch_size: examples per batch; a last batch of one example joins the one before.
        set_training_mode: sets the mode in which clients train.

    >>> net = nn.Sequential(nn.BatchNorm1d(1))
    >>> batch, served = outputs_in_both_modes(net, torch.tensor([[9.0], [11.0]]), 2)
    >>> batch.flatten().round().tolist(), served.flatten().round().tolist()
    ([-1.0, 1.0], [9.0, 11.0])
    """
    served, saved = logits(model, x), clone(model.state_dict())
    set_training_mode(model)
    for layer in model.modules():
        if isinstance(layer, _DropoutNd):
            layer.eval()
    parts = list(x.split(batch_size))
    if len(parts) > 1 and len(parts[-1]) == 1:
        parts[-2:] = [torch.cat(parts[-2:])]
    with torch.no_grad():
        batch = torch.cat([model(rows) for rows in parts])
    model.load_state_dict(saved)
    model.eval()
    return batch, served

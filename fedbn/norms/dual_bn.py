"""Dual BN: clean and adversarial examples are normalized by separate layers.

Each BN layer is replaced by two (Xie et al., AdvProp, CVPR 2020, https://arxiv.org/abs/1911.09665). In federated
learning: FedRBN (Hong, Wang, Wang, Zhou, AAAI 2023, https://arxiv.org/abs/2106.10196).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

from torch import Tensor, nn

from fedbn.nn.conversion import converted, replace_norms

Branch = Literal["clean", "adversarial"]


class DualBN(nn.Module):
    """Two copies of ``layer``, for clean and adversarial examples; ``branch`` selects the active one.

    >>> import torch
    >>> layer = DualBN(nn.BatchNorm1d(1)); layer.branch = "adversarial"; _ = layer(torch.tensor([[10.0], [30.0]]))
    >>> float(layer.clean.running_mean), float(layer.adversarial.running_mean)
    (0.0, 2.0)
    """

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.clean = layer
        self.adversarial = copy.deepcopy(layer)
        self.branch: Branch = "clean"

    def forward(self, input: Tensor) -> Tensor:
        """Normalized activations, of the input's shape."""
        out: Tensor = (self.clean if self.branch == "clean" else self.adversarial)(input)
        return out


@contextmanager
def adversarial(model: nn.Module) -> Iterator[None]:
    """Use the adversarial branch of every dual layer of ``model`` inside the ``with`` block.

    >>> net = convert(nn.Sequential(nn.BatchNorm1d(4)))
    >>> with adversarial(net): net[0].branch
    'adversarial'
    >>> net[0].branch
    'clean'
    """
    layers = [m for m in model.modules() if isinstance(m, DualBN)]
    before = [layer.branch for layer in layers]
    for layer in layers:
        layer.branch = "adversarial"
    try:
        yield
    finally:
        for layer, branch in zip(layers, before, strict=True):
            layer.branch = branch


def convert(model: nn.Module) -> nn.Module:
    """Replace every layer with batch statistics by two copies; state names gain ``clean`` or ``adversarial``.

    >>> sorted({k.split(".")[1] for k in convert(nn.Sequential(nn.BatchNorm1d(4))).state_dict()})
    ['adversarial', 'clean']
    """
    return replace_norms(model, lambda _path, layer: DualBN(layer), converted(model, "dual-bn"))

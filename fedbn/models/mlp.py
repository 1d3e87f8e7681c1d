"""A multi-layer perceptron with BN, for flat features."""

from __future__ import annotations

from math import prod

from torch import Tensor, nn

from fedbn.models.base import Network


class MLP(Network):
    """One hidden layer of 32 with BN and ReLU; examples of any shape are flattened.

    >>> import torch
    >>> MLP((1, 8, 8), 10)(torch.zeros(2, 1, 8, 8)).shape
    torch.Size([2, 10])
    """

    name = "mlp"
    about = "MLP with one hidden layer of 32 and BN"

    def __init__(self, shape: tuple[int, ...], classes: int) -> None:
        super().__init__(shape, classes)
        self.hidden = nn.Sequential(nn.Linear(prod(shape), 32), nn.BatchNorm1d(32), nn.ReLU())
        self.classifier = nn.Linear(32, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``[N, classes]``."""
        return self.classifier(self.hidden(x.flatten(1)))

r"""An MLP with BN and dropout before every layer and skip connections (Kim, 2021, https://arxiv.org/abs/2108.08186).

The *independent-component* layer IC is BN followed by dropout (Chen, Chen, Shi, Hou, Liao, Zhang, 2019,
https://arxiv.org/abs/1905.05928), placed *before* a linear layer:

.. math:: \text{residual}: y = \mathrm{ReLU}(W_2\,\mathrm{IC}(\mathrm{ReLU}(W_1\,\mathrm{IC}(x))) + x), \qquad
          \text{down}: y = \mathrm{ReLU}(W\,\mathrm{IC}(x)) \in \mathbb{R}^{n/2}.
"""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor, nn

from fedbn.errors import UserError
from fedbn.models.base import Network
from fedbn.seeds import seeded


def ic_layer(width: int, p: float) -> nn.Sequential:
    """BN, then dropout with probability ``p``.

    >>> [type(m).__name__ for m in ic_layer(4, 0.1)]
    ['BatchNorm1d', 'Dropout']
    """
    return nn.Sequential(nn.BatchNorm1d(width), nn.Dropout(p))


class Residual(nn.Module):
    """Two linear layers of ``width`` with a skip connection around both.

    Args:
        width: units.
        p: dropout probability.
        ic: put IC before each linear layer.
        skip: add the input.
        first: whether this is the first block of the net, which has no IC before its first linear layer.
    """

    def __init__(self, width: int, p: float, *, ic: bool, skip: bool, first: bool) -> None:
        super().__init__()
        self.skip = skip
        self.ic1 = ic_layer(width, p) if ic and not first else nn.Identity()
        self.linear1 = nn.Linear(width, width)
        self.ic2 = ic_layer(width, p) if ic else nn.Identity()
        self.linear2 = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[N, width]`` to ``[N, width]``."""
        h = self.linear2(self.ic2(self.linear1(self.ic1(x)).relu()))
        return (h + x if self.skip else h).relu()


class Down(nn.Module):
    """A linear layer that halves ``width``, with IC before and ReLU after it."""

    def __init__(self, width: int, p: float, *, ic: bool) -> None:
        super().__init__()
        self.ic = ic_layer(width, p) if ic else nn.Identity()
        self.linear = nn.Linear(width, width // 2)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[N, width]`` to ``[N, width // 2]``."""
        return self.linear(self.ic(x)).relu()


class ResMLP(Network):
    """Blocks of residual layers that each halve the width.

    With 512 inputs and 2 classes this is the author's gender model.

    Args:
        shape: of an example (an embedding); flattened.
        classes: number of classes.
        blocks: number of times the width is halved.
        residuals: residual layers before each halving.
        p: dropout probability.
        ic: use IC layers.
        skip: use skip connections. Without both this is a plain MLP.

    >>> net = ResMLP((512,), 2)
    >>> net(torch.zeros(2, 512)).shape, sum(p.numel() for p in net.parameters())
    (torch.Size([2, 2]), 877602)
    """

    name = "resmlp"
    about = "MLP with BN, dropout and skip connections, for embeddings"

    def __init__(
        self,
        shape: tuple[int, ...],
        classes: int,
        blocks: int = 4,
        residuals: int = 1,
        p: float = 0.05,
        ic: bool = True,
        skip: bool = True,
    ) -> None:
        super().__init__(shape, classes)
        width = prod(shape)
        if width < 2**blocks:
            raise UserError(f"resmlp halves its width {blocks} times: {width} features are too few, {2**blocks} needed")
        layers: list[nn.Module] = []
        for block in range(blocks):
            for i in range(residuals):
                layers.append(Residual(width, p, ic=ic, skip=skip, first=block == i == 0))
            layers.append(Down(width, p, ic=ic))
            width //= 2
        self.blocks = nn.Sequential(*layers)
        self.classifier = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``[N, classes]``."""
        return self.classifier(self.blocks(x.flatten(1)))


def mc_dropout(model: nn.Module, x: Tensor, samples: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Predictions averaged over dropout masks, with their entropy as uncertainty; BN stays in evaluation mode.

    Gal, Ghahramani, 2016, https://arxiv.org/abs/1506.02142

    Args:
        model: any model; left in evaluation mode.
        x: ``[n, *shape]``.
        samples: number of masks.
        seed: seed of the masks; torch's global generator does not change.

    Returns:
        Probabilities ``[n, classes]`` and entropy in nats ``[n]``.

    >>> p, h = mc_dropout(ResMLP((16,), 2), torch.randn(3, 16), samples=4)
    >>> bool(torch.allclose(p.sum(1), torch.ones(3))), h.shape
    (True, torch.Size([3]))
    """
    model.eval()
    dropouts = [m for m in model.modules() if isinstance(m, nn.Dropout)]
    for layer in dropouts:
        layer.train()
    with seeded(seed, "dropout masks"), torch.no_grad():
        p = torch.stack([model(x).softmax(1) for _ in range(samples)]).mean(0)
    for layer in dropouts:
        layer.eval()
    return p, torch.special.entr(p).sum(1)

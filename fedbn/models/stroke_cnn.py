"""A 1-D CNN with BN for EEG and EOG: *our stand-in* for the one of Giri, Fanany, Arymurthy (2016).

https://arxiv.org/abs/1610.01757 describes a 1-D CNN with BN on 24 hand-crafted features of 62 subjects. Its layers,
kernels, optimizer and list of features were not available to us, so the network below is our design.
"""

from __future__ import annotations

from torch import Tensor, nn

from fedbn.models.base import Network


class StrokeEEG1DCNN(Network):
    """Three convolutions (16, 32, 32) with BN and ReLU, the last two with pooling; a hidden layer of 64 with dropout.

    The input is the 24 features as a sequence ``[1, 24]`` or raw windows ``[channels, samples]``; only the input width
    of the hidden layer differs. For a version without BN, use `fedbn.nn.conversion.convert` with ``none``.

    >>> import torch
    >>> StrokeEEG1DCNN((1, 24), 2)(torch.zeros(2, 1, 24)).shape, StrokeEEG1DCNN((6, 256), 2).hidden[0].in_features
    (torch.Size([2, 2]), 2048)
    """

    name = "stroke-cnn"
    about = "1-D CNN with BN for EEG/EOG features or windows (16-32-32-64)"

    def __init__(self, shape: tuple[int, ...], classes: int) -> None:
        super().__init__(shape, classes)
        self.require_shape(len(shape) == 2 and shape[1] >= 4, "[channels, length >= 4]", shape)

        def block(in_channels: int, width: int) -> list[nn.Module]:
            return [nn.Conv1d(in_channels, width, 3, padding=1), nn.BatchNorm1d(width), nn.ReLU()]

        self.features = nn.Sequential(
            *block(shape[0], 16), *block(16, 32), nn.MaxPool1d(2), *block(32, 32), nn.MaxPool1d(2)
        )
        self.hidden = nn.Sequential(nn.Linear(32 * (shape[1] // 4), 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Dropout(0.5))
        self.classifier = nn.Linear(64, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``[N, classes]`` of ``[N, channels, length]``."""
        return self.classifier(self.hidden(self.features(x).flatten(1)))

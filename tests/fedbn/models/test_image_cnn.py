from __future__ import annotations

import torch

from fedbn.models.image_cnn import ImageCNN
from tests.fedbn.helpers import rejects


def test_image_cnn_finds_pattern_anywhere():
    torch.manual_seed(0)
    net = ImageCNN((1, 40, 40), 5).double().eval()
    pattern = torch.rand(8, 8, dtype=torch.float64)
    x = torch.zeros(3, 1, 40, 40, dtype=torch.float64)
    for image, (top, left) in zip(x[:, 0], ((12, 12), (12, 20), (20, 12)), strict=True):
        image[top : top + 8, left : left + 8] = pattern
    outputs = net(x)
    torch.testing.assert_close(outputs[1:], outputs[:1].expand(2, -1))
    assert not torch.allclose(outputs[0], net(torch.zeros_like(x))[0])


def test_image_cnn_rejects_other_shapes():
    rejects("image-cnn takes images .*, not examples of shape .3, 128.", ImageCNN, (3, 128), 5)

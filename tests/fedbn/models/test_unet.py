from __future__ import annotations

import pytest
import torch

from fedbn.models.unet import UNet
from tests.fedbn.helpers import rejects


@pytest.mark.parametrize("sides", [(4, 4), (28, 28), (16, 32)])
def test_unet_has_output_for_every_pixel(sides):
    assert UNet((3, *sides), 4)(torch.zeros(2, 3, *sides)).shape == (2, 4, *sides)


def test_unet_output_depends_on_pixel_and_on_its_surroundings():
    torch.manual_seed(0)
    net = UNet((1, 32, 32), 2).double().eval()
    x = torch.randn(1, 1, 32, 32, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(net(x)[0, 1, 16, 16], x)
    reached = gradient[0, 0].abs() > 0
    assert reached[16, 16]
    # Two 3x3 convolutions at full size alone would reach 4 pixels.
    assert reached[16].nonzero().sub(16).abs().max() > 12


def test_unet_uses_skip_connections():
    net = UNet((1, 16, 16), 2).eval()
    with torch.no_grad():
        for up in (net.up1, net.up2):
            up.weight.zero_()
            up.bias.zero_()
    a, b = torch.randn(2, 1, 1, 16, 16)
    assert not torch.equal(net(a), net(b))


def test_unet_rejects_sides_that_cannot_be_halved_twice():
    rejects("unet takes images .* with sides divisible by 4, not examples of shape .1, 28, 30.", UNet, (1, 28, 30), 2)

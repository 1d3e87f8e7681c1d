"""Post-training of TTN: channels affected by a shift follow the batch, the others the source."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fedbn.errors import UserError
from fedbn.nn.roles import clone
from fedbn.online import personalize, rule
from fedbn.online.ttn_alpha import gain_and_noise, learn_alpha
from tests.helpers import same

SHIFTED = 1
"""Index of the channel that the augmentation shifts."""


def batches(n=6, rows=40):
    draw = torch.Generator().manual_seed(0)
    y = torch.arange(rows) % 2
    return [(torch.randn(rows, 3, generator=draw) + 2 * y[:, None] - 1, y) for _ in range(n)]


def shift_channel(x, draw):
    return x + torch.tensor([0.0, 4.0, 0.0]) * torch.randn((), generator=draw)


@pytest.fixture(scope="module")
def model():
    """Model that uses three channels equally."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 2))
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    for _ in range(8):
        for x, y in batches():
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(x), y).backward()
            optimizer.step()
    return net.eval()


def learn(model, **options):
    return learn_alpha(model, batches(), torch.Generator().manual_seed(0), **options)


def test_shifted_channel_follows_the_batch(model):
    before = clone(model.state_dict())
    alpha = learn(model, augment=shift_channel, epochs=20)["0"].alpha
    assert alpha.argmax() == SHIFTED
    assert alpha[SHIFTED] > 0.8
    assert same(before, model.state_dict()), "the model must not change"


def test_alpha_starts_from_prior_and_is_held_by_penalty(model):
    start = learn(model, augment=shift_channel, epochs=0)["0"].alpha
    assert (start.min(), start.max()) == (0, 1)
    held = learn(model, augment=shift_channel, lam=1e6)["0"].alpha
    torch.testing.assert_close(held, start, atol=0.05, rtol=0)


def test_learned_alpha_helps_shifted_users_only(model):
    prior = learn(model, augment=shift_channel, epochs=20)
    x, y = batches(7)[-1]
    for shift, gain in ((torch.zeros(3), 0.0), (torch.tensor([0.0, 6.0, 0.0]), 0.1)):
        net = personalize(model, rule("ttn"), prior)
        accuracy = (net.predict(x + shift, user="ann").argmax(1) == y).double().mean()
        source = (model(x + shift).argmax(1) == y).double().mean()
        assert accuracy >= source + gain - 0.03


def test_gain_and_noise_is_reproducible():
    x = torch.randn(5, 6, 32)
    changed = gain_and_noise(x, torch.Generator().manual_seed(0))
    assert changed.shape == x.shape
    assert not torch.allclose(changed, x)
    assert torch.equal(changed, gain_and_noise(x, torch.Generator().manual_seed(0)))


def test_learn_alpha_rejects_bad_input(model):
    for data in ([], [(torch.zeros(1, 3), torch.zeros(1, dtype=torch.long))]):
        with pytest.raises(UserError, match="batches of at least two windows"):
            learn_alpha(model, data, torch.Generator())

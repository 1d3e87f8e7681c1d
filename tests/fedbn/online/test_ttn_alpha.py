"""TTN's post-training: channels that a shift disturbs come to trust the batch, the others the source."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fedbn.errors import UserError
from fedbn.online import personalize, rule
from fedbn.online.ttn_alpha import augmented, learn_alpha

SHIFTED = 1
"""The one channel of three that the augmentation of these tests moves."""


def batches(n=6, rows=40):
    draw = torch.Generator().manual_seed(0)
    y = torch.arange(rows) % 2
    return [(torch.randn(rows, 3, generator=draw) + 2 * y[:, None] - 1, y) for _ in range(n)]


def moved(x, draw):
    return x + torch.tensor([0.0, 4.0, 0.0]) * torch.randn((), generator=draw)


@pytest.fixture(scope="module")
def model():
    """Uses all three channels alike, and normalizes each by itself."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 2))
    rate = torch.optim.SGD(net.parameters(), 0.1)
    for _ in range(8):
        for x, y in batches():
            rate.zero_grad()
            nn.functional.cross_entropy(net(x), y).backward()
            rate.step()
    return net.eval()


def learn(model, **options):
    return learn_alpha(model, batches(), torch.Generator().manual_seed(0), **options)


def test_the_channel_that_a_shift_moves_comes_to_follow_the_batch(model):
    before = {k: v.clone() for k, v in model.state_dict().items()}
    alpha = learn(model, augment=moved, epochs=20)["0"].alpha
    assert alpha.argmax() == SHIFTED
    assert alpha[SHIFTED] > 0.8
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items()), "the model is left alone"


def test_the_start_is_the_squared_sensitivity_and_the_prior_can_hold_the_weights_there(model):
    start = learn(model, augment=moved, epochs=0)["0"].alpha
    assert start.min() == 0
    assert start.max() == 1
    held = learn(model, augment=moved, lam=1e6)["0"].alpha
    torch.testing.assert_close(held, start, atol=0.05, rtol=0)


def test_learnt_weights_help_a_shifted_user_and_leave_others_as_they_were(model):
    prior = learn(model, augment=moved, epochs=20)
    x, y = batches(7)[-1]
    for shift, best in ((torch.zeros(3), 0.0), (torch.tensor([0.0, 6.0, 0.0]), 0.1)):
        net = personalize(model, rule("ttn"), prior)
        right = (net.predict(x + shift, user="ann").argmax(1) == y).double().mean()
        source = (model(x + shift).argmax(1) == y).double().mean()
        assert right >= source + best - 0.03


def test_windows_of_sensors_are_augmented_by_gain_and_noise():
    x = torch.randn(5, 6, 32)
    changed = augmented(x, torch.Generator().manual_seed(0))
    assert changed.shape == x.shape
    assert not torch.allclose(changed, x)
    assert torch.equal(changed, augmented(x, torch.Generator().manual_seed(0)))


def test_too_little_to_learn_from_is_said(model):
    for given in ([], [(torch.zeros(1, 3), torch.zeros(1, dtype=torch.long))]):
        with pytest.raises(UserError, match="batches of two windows at least"):
            learn_alpha(model, given, torch.Generator())

from __future__ import annotations

import pytest
import torch
from torch import nn

from fedbn.errors import UserError
from fedbn.online import fit_alignment, personalize
from fedbn.online.fallback import AGAINST, LARGEST, Fallback, FallbackModel, log_ratio
from fedbn.seeds import generator

TRIPLES = ((0, 1, 2), (3, 4, 5))
DIRECTIONS = torch.eye(3)


def windows(draw, y, turn=None):
    """Windows ``[n, 6, 16]`` whose gravity is the axis of their class."""
    x = 0.1 * torch.randn(len(y), 6, 16, generator=draw)
    x[:, :3] += DIRECTIONS[y][:, :, None]
    if turn is not None:
        x[:, :3], x[:, 3:] = turn @ x[:, :3], turn @ x[:, 3:]
    return x


@pytest.fixture(scope="module")
def aligner():
    draw = generator(0, "fallback")
    y = torch.arange(30) % 3
    return fit_alignment("rotation", [(windows(draw, y), y) for _ in range(3)], 3, TRIPLES)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.BatchNorm1d(6), nn.Flatten(), nn.Linear(96, 3)).eval()


def test_log_ratio_is_that_of_the_mixture_of_classes(aligner):
    draw = generator(1, "fallback")
    z, _ = aligner.measure(windows(draw, torch.tensor([0, 1, 2, 0])))
    value = torch.nn.functional.normalize(torch.randn(4, 4, generator=draw), dim=1).double()
    moved = torch.cat([aligner.alignment.transform(v, row[None]) for v, row in zip(value, z)])
    classes = torch.distributions.MultivariateNormal(aligner.prior.mean, aligner.prior.cov)
    weights = torch.distributions.Categorical(torch.ones(3).double())
    density = torch.distributions.MixtureSameFamily(weights, classes).log_prob
    torch.testing.assert_close(log_ratio(aligner, value, z), density(moved) - density(z))
    identity = aligner.identity.expand(4, -1)
    torch.testing.assert_close(log_ratio(aligner, identity, z), torch.zeros(4).double())


def test_fallback_answers_as_source_after_the_device_turned(aligner):
    """The alignment of all windows so far does not fit those after a turn; before it, nothing changes."""
    draw, model = generator(2, "fallback"), network()
    half = torch.linalg.matrix_exp(torch.tensor([[0.0, -2.5, 0], [2.5, 0, 0], [0, 0, 0]]))
    y = torch.arange(60) % 3
    x = torch.cat([windows(draw, y, half), windows(draw, y[:15])])
    net = personalize(model, "source", align=aligner)
    plain = personalize(model, "source", align=aligner)
    follower = FallbackModel(net, model)
    equal_net, equal_source, evidence = [], [], 0.0
    for window in x.split(1):
        aligned = plain(window, user=["ann"])
        z, _ = aligner.measure(window)
        ratio = log_ratio(aligner, net.bank.rows["align_value"][[net.bank.slot.get("ann", 0)]], z)
        against = evidence < -AGAINST * aligner.alignment.b
        out = follower.predict(window, user=["ann"])
        follower.commit(out.softmax(1))
        expected = model(window) if against else aligned
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
        evidence = (1 - 1 / 50) * evidence + float(ratio.clamp(-LARGEST, LARGEST))
        assert follower.evidence["ann"] == pytest.approx(evidence, rel=1e-6, abs=1e-6)
        equal_net.append(torch.allclose(out, aligned, rtol=1e-4, atol=1e-5))
        equal_source.append(against)
    assert all(equal_net[:60])
    assert not any(equal_source[:60])
    assert any(equal_source[60:])


def test_fallback_is_of_one_user_only(aligner):
    model = network()
    follower = FallbackModel(personalize(model, "source", align=aligner), model, Fallback(memory=5))
    turn = torch.linalg.matrix_exp(torch.tensor([[0.0, -2.0, 0], [2.0, 0, 0], [0, 0, 0]]))
    x = windows(generator(3, "fallback"), torch.arange(20) % 3, turn)
    for window in x:
        follower.net(window[None], user="bob")
    follower.evidence["ann"] = -1000.0
    out = follower.predict(torch.stack([x[0], x[0]]), user=["ann", "bob"])
    torch.testing.assert_close(out[:1], model(x[:1]))
    assert not torch.allclose(out[1], out[0])
    assert follower.windows == {"ann": 1}
    follower.commit(out.softmax(1))
    assert follower.evidence["ann"] == pytest.approx(-800.0)
    assert follower.evidence["bob"] > 0


def test_fallback_needs_an_alignment():
    model = network()
    with pytest.raises(UserError, match="name one, e.g. rotation/fallback"):
        FallbackModel(personalize(model, "source"), model)
    with pytest.raises(UserError, match="memory must be at least 1, not 0"):
        Fallback(memory=0)

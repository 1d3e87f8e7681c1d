from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from fedbn.errors import UserError
from fedbn.online import fit_alignment, personalize
from fedbn.online.alignments.evidence import AGAINST, EVIDENCE_MEMORY, LARGEST
from fedbn.online.fallback import FallbackModel
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
    return fit_alignment("rotation:recent=0", [(windows(draw, y), y) for _ in range(3)], 3, TRIPLES)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.BatchNorm1d(6), nn.Flatten(), nn.Linear(96, 3)).eval()


def test_evidence_is_that_of_the_mixture_of_classes(aligner):
    draw = generator(1, "fallback")
    z, usable = aligner.measure(windows(draw, torch.tensor([0, 1, 2, 0])))
    value = torch.nn.functional.normalize(torch.randn(4, 4, generator=draw), dim=1).double()
    value[3] = aligner.identity
    moved = torch.cat([aligner.alignment.transform(v, row[None]) for v, row in zip(value, z)])
    classes = torch.distributions.MultivariateNormal(aligner.prior.mean, aligner.prior.cov)
    weights = torch.distributions.Categorical(torch.ones(3).double())
    density = torch.distributions.MixtureSameFamily(weights, classes).log_prob
    rows = {k: v.repeat(4, *[1] * (v.dim() - 1)).double() for k, v in aligner.start(torch.zeros(1)).items()}
    rows["align_value"], rows["align_evidence"] = value, torch.full((4,), 2.0).double()
    aligner.learn(rows, torch.arange(4), z, usable, torch.ones(4))
    ratio = (density(moved) - density(z)).clamp(-LARGEST, LARGEST) / aligner.alignment.b
    expected = 2 * math.exp(-1 / EVIDENCE_MEMORY) + ratio
    torch.testing.assert_close(aligner.evidence(rows, torch.arange(4)), expected)
    assert ratio[3] == 0


def test_fallback_answers_as_source_after_the_device_turned(aligner):
    """The alignment of all windows so far does not fit those after a turn; before it, nothing changes."""
    draw, model = generator(2, "fallback"), network()
    half = torch.linalg.matrix_exp(torch.tensor([[0.0, -2.5, 0], [2.5, 0, 0], [0, 0, 0]]))
    y = torch.arange(30) % 3
    x = torch.cat([windows(draw, y, half), windows(draw, y)])
    net, plain = (personalize(model, "source", align=aligner) for _ in range(2))
    follower, rejected = FallbackModel(net, model), []
    for window in x.split(1):
        aligned = plain(window, user=["ann"])
        rejected.append("ann" in net.users and net.report("ann")["alignment"]["evidence"] < -AGAINST)
        out = follower.predict(window, user=["ann"])
        follower.commit(out.softmax(1))
        torch.testing.assert_close(out, model(window) if rejected[-1] else aligned, rtol=1e-4, atol=1e-5)
    assert not any(rejected[:30])
    assert any(rejected[30:])
    assert follower.windows == {"ann": sum(rejected)}


def test_fallback_is_of_one_user_only_and_part_of_its_state(aligner):
    model = network()
    follower = FallbackModel(personalize(model, "source", align=aligner), model)
    turn = torch.linalg.matrix_exp(torch.tensor([[0.0, -2.0, 0], [2.0, 0, 0], [0, 0, 0]]))
    x = windows(generator(3, "fallback"), torch.arange(20) % 3, turn)
    for window in x:
        follower.net(torch.stack([window, window]), user=["ann", "bob"])
    rows, slot = follower.net.bank.rows, follower.net.bank.slot
    assert float(rows["align_evidence"][slot["bob"]]) > 0
    rows["align_evidence"][slot["ann"]] = -100.0
    other = FallbackModel(personalize(model, "source", align=aligner), model)
    for user in ("ann", "bob"):
        other.net.load(user, follower.net.state(user))
    for each in (follower, other):
        out = each.predict(x[[0, 0, 0]], user=["ann", "bob", "ann"])
        torch.testing.assert_close(out[[0, 2]], model(x[[0, 0]]))
        assert not torch.allclose(out[1], out[0])
        assert each.windows == {"ann": 2}


def test_fallback_needs_an_alignment():
    model = network()
    with pytest.raises(UserError, match="name one, e.g. rotation/fallback"):
        FallbackModel(personalize(model, "source"), model)

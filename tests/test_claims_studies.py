"""What single studies do besides training: cameras, batches, choices in favour of the other side."""

from __future__ import annotations

import pytest
import torch

from fedbn.evaluation import Score
from fedbn.federation import Outcome
from fedbn.scenario import Examples
from simulations.claims import bench, claims, embeddings, normalisers, personal, pretrained, resmlp


def test_cameras_do_what_they_are_called():
    draw = torch.Generator().manual_seed(0)
    x = torch.rand(200, 1, 8, 8, generator=draw)
    seen = {d: embeddings.seen_by(d, x, draw) for d in embeddings.DOMAINS}
    assert torch.equal(seen["as it is"], x)
    assert float(seen["low contrast"].std() / x.std()) == pytest.approx(0.3)
    assert float((seen["noise"] - x).std()) == pytest.approx(0.3, rel=0.05)
    assert float(seen["bright"].mean()) > float(x.mean()) + 0.5
    slow = torch.stack([x[:, 0, i : i + 3, j : j + 3].mean((1, 2)) for i in range(6) for j in range(6)], 1)
    torch.testing.assert_close(seen["blur"][:, 0, 1:-1, 1:-1].flatten(1), slow)


def test_no_image_is_in_two_domains():
    trains, tests = embeddings._worlds(0)
    assert [len(e) for e in trains.values()] == [embeddings.ROWS] * 5
    data, test = bench.digits(0)
    # A gain does not hide which image it was.
    assert torch.equal(trains["as it is"].x, data.x[: embeddings.ROWS])
    torch.testing.assert_close((trains["low contrast"].x - 0.35) / 0.3, data.x[embeddings.ROWS : 2 * embeddings.ROWS])
    assert all(torch.equal(e.y, test.y) for e in tests.values())


def test_a_batch_is_one_users():
    sizes = [70, 33, 64]
    data = Examples(torch.zeros(sum(sizes), 1), torch.zeros(sum(sizes)).long(), torch.zeros(sum(sizes)).long())
    owner = torch.repeat_interleave(torch.arange(3), torch.tensor(sizes))
    got = list(personal.one_user_a_batch(data, sizes, 2, seed=0))
    assert len(got) == 2 * (2 + 1 + 2)
    assert all(len(rows) == 32 and len(owner[rows].unique()) == 1 for rows in got)
    assert len(set(torch.cat(got[:5]).tolist())) == 5 * 32
    assert [int(owner[r[0]]) for r in got] != sorted(int(owner[r[0]]) for r in got)


def test_dropout_gets_its_best_rate_and_bn_five_times_that():
    errors = {f"dropout {r}": e for r, e in zip(pretrained.PAIRS["dropout"], (0.5, 0.2, 0.3, 0.9))}
    errors |= {f"bn {r}": e for r, e in zip(pretrained.PAIRS["bn"], (0.01, 0.15, 0.02, 0.03))}
    assert pretrained.at_best_rate(errors) == pytest.approx(0.05)
    for low, high in zip(pretrained.PAIRS["dropout"], pretrained.PAIRS["bn"]):
        assert float(high) == pytest.approx(5 * float(low))
    (claim,) = claims(["pretrained-rate"])
    assert set(claim.arms) == set(errors)


def test_embeddings_are_of_unit_length_balanced_and_not_linearly_given():
    data, test = resmlp.embeddings(0, 512)
    torch.testing.assert_close(data.x.norm(dim=1), torch.ones(512))
    assert 0.4 < float(data.y.double().mean()) < 0.6
    assert len(data) == len(test) == 512
    assert not torch.equal(data.x, test.x)


def test_a_federated_accuracy_is_of_one_cell_of_the_matrix():
    scores = {0: [Score("own", "aggregated", 9, 0.5, 0, 0), Score("own", "recalibrated", 9, 0.9, 0, 0)]}
    scores[1] = [Score("own", "aggregated", 9, 0.7, 0, 0), Score("global", "aggregated", 9, 0.1, 0, 0)]
    outcome = Outcome.__new__(Outcome)
    outcome.scores = scores
    assert bench.mean_accuracy(outcome, "own") == pytest.approx(0.6)
    assert bench.mean_accuracy(outcome, "global") == pytest.approx(0.1)


def test_a_federated_cell_is_determined_by_its_arguments():
    def one():
        return normalisers.federated("groupnorm", 0, True, scenario="digits8", partition="natural", rounds=1)

    assert one() == one()
    assert set(one()) == {"own test", "global test"}

"""The comparisons with other implementations and published baselines use the same data, models and held-out people."""

from __future__ import annotations

import pytest
import torch

from benchmarks import hapt_baseline, peer_accuracy
from fedbn.data.examples import Examples, User
from fedbn.errors import UserError
from fedbn.scenarios.base import scenario


def test_folds_hold_out_each_person_once():
    folds = hapt_baseline.folds(30)
    assert sorted(i for fold in folds for i in fold) == list(range(30))
    assert [number - 1 for number in hapt_baseline.UCI_HAR_TEST] == list(folds[0])


def test_held_out_people_have_both_recordings_and_never_train():
    users = scenario("hapt").load(0).users[:7]
    population = hapt_baseline.left_out(users, (3, 5))
    assert population.unseen == (3, 5)
    for i, (user, given) in enumerate(zip(population.users, users, strict=True)):
        total = len(given.train) + len(given.test)
        if i in population.unseen:
            assert len(user.test) == total
        else:
            assert 0.85 * total < len(user.train) < 0.95 * total
            recordings = torch.cat([given.train.recording, given.test.recording])
            assert torch.equal(user.train.recording.unique(), recordings.unique())


def test_changes_combine_those_with_a_gain():
    scores = {"default": 0.9, "longer": 0.904, "lower rate": 0.906, "rotate": 0.92, "jitter": 0.91}
    chosen = hapt_baseline.combine(scores)
    assert chosen == ["lower rate", "rotate", "jitter"]
    assert hapt_baseline.together(chosen) == {"lr": 0.02, "augment": "rotate:strength=0.2+jitter:scale=0.05"}


def test_training_data_are_whole_batches():
    rows = Examples(torch.zeros(27, 2), torch.zeros(27, dtype=torch.long), torch.zeros(27, dtype=torch.long))
    assert len(peer_accuracy._whole_batches(User("a", "a", rows, rows)).train) == 20


def test_peer_needs_a_clone(tmp_path):
    with pytest.raises(UserError, match="no directory 'system'"):
        peer_accuracy.main(["pfllib", str(tmp_path)])

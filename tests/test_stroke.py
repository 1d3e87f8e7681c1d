"""The synthetic stroke cohort, its network, features of recorded EEG, and the tables of scikit-learn."""

from __future__ import annotations

import sys
import types

import numpy as np
import pytest
import torch
from torch import nn

from fedbn.data.eeg import read_windows
from fedbn.errors import UserError
from fedbn.layers import convert
from fedbn.models.stroke_cnn import StrokeEEG1DCNN
from fedbn.roles import norm_layers
from fedbn.scenario import scenario
from fedbn.scenarios.stroke import BANDS, band_powers, cohort
from simulations.claims.stroke import folds

# --- the cohort


def test_relative_powers_sum_to_one_in_every_channel():
    made = cohort(62, 5, seed=3)
    assert made.x.shape == (310, 1, 24)
    torch.testing.assert_close(made.x.view(-1, 6, 4).sum(2), torch.ones(310, 6))
    assert (made.x > 0).all()
    assert made.y.float().mean() == 0.5
    assert made.subject.bincount().tolist() == [5] * 62


def test_the_seed_decides_everything():
    assert torch.equal(cohort(10, 3, 1).x, cohort(10, 3, 1).x)
    assert not torch.equal(cohort(10, 3, 1).x, cohort(10, 3, 2).x)


def test_stroke_slows_the_eeg_of_one_hemisphere():
    made = cohort(2000, 2, seed=0)
    log = made.x.view(-1, 6, 4).log()
    slow = log[..., 0] - log[..., 2]  # delta against alpha
    ill, well = slow[made.y == 1], slow[made.y == 0]
    # The lesioned hemisphere is shifted by 1.2 times the severity, the other by 0.2 of that: the mean by 0.6 of it.
    severity = np.exp(0.3**2 / 2)
    assert float(ill[:, :4].mean() - well[:, :4].mean()) == pytest.approx(1.2 * 0.6 * severity, rel=0.1)
    assert float(ill[:, 4:].mean() - well[:, 4:].mean()) == pytest.approx(1.2 * 0.3 * severity, rel=0.2)
    # Left against right: no difference on average, more spread in patients.
    left = [s[:, 0] + s[:, 2] - s[:, 1] - s[:, 3] for s in (ill, well)]
    assert abs(float(left[0].mean())) < 0.1
    assert float(left[0].std()) > 1.5 * float(left[1].std())


def test_a_hospitals_response_moves_its_features_and_a_gain_of_all_bands_does_not():
    plain = cohort(8, 2, 0)
    gain = cohort(8, 2, 0, torch.full((8, 6, 4), 0.7))
    torch.testing.assert_close(gain.x, plain.x)
    tilted = torch.zeros(8, 6, 4)
    tilted[:, :, 0] = 0.5
    assert (cohort(8, 2, 0, tilted).x.view(-1, 6, 4)[..., 0] > plain.x.view(-1, 6, 4)[..., 0]).all()


def test_hospitals_test_on_other_subjects_of_both_kinds():
    people = scenario("stroke").load(0)
    assert len(people.users) == 6
    seen = [set(u.train.recording.tolist()) | set(u.test.recording.tolist()) for u in people.users]
    assert sum(map(len, seen)) == len(set().union(*seen)) == 62
    for user in people.users:
        assert not set(user.train.recording.tolist()) & set(user.test.recording.tolist())
        assert set(user.test.y.tolist()) == set(user.train.y.tolist()) == {0, 1}
        assert user.test.y.float().mean() == 0.5


def test_amplifiers_make_the_hospitals_differ():
    def spread(text):
        return torch.stack([u.train.x.mean(0) for u in scenario(text).load(0).users]).std(0).mean()

    assert spread("stroke") > 1.5 * spread("stroke:response=0")


def test_folds_never_part_a_subject():
    made = cohort(62, 4, 0)
    tested = []
    for train, test in folds(made, 5, seed=0):
        assert not set(made.subject[train].tolist()) & set(made.subject[test].tolist())
        assert len(train) + len(test) == len(made.y)
        tested += test.tolist()
    assert sorted(tested) == list(range(len(made.y)))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stroke:hospitals=8", "62 subjects in 8 hospitals: choose 2 hospitals or more, with 8 subjects each"),
        ("stroke:hospitals=1:unseen=0", "choose 2 hospitals or more"),
        ("stroke:epochs=0", "epochs=0: choose 1 or more"),
        ("stroke:unseen=6", "6 unseen of 6 users leaves nobody"),
        ("tabular:users=1", "users=1: choose 2 to 71, breast-cancer has 569 rows"),
        ("tabular:table=wine:users=50", "choose 2 to 22, wine has 178 rows"),
        ("tabular:table=iris", "unknown value for scenario 'tabular', option 'table' 'iris'"),
    ],
)
def test_an_impossible_cohort_or_table_names_the_fix(text, message):
    with pytest.raises(UserError, match=message):
        scenario(text).load(0)


# --- the network


def test_bn_stands_after_every_convolution_and_before_its_relu():
    layers = list(StrokeEEG1DCNN((1, 24), 2).features)
    for i, layer in enumerate(layers):
        if isinstance(layer, nn.Conv1d):
            assert isinstance(layers[i + 1], nn.BatchNorm1d)
            assert isinstance(layers[i + 2], nn.ReLU)
    assert sum(isinstance(m, nn.Conv1d) for m in layers) == 3


def test_features_and_raw_windows_enter():
    assert StrokeEEG1DCNN((1, 24), 2)(torch.randn(4, 1, 24)).shape == (4, 2)
    assert StrokeEEG1DCNN((6, 250), 3)(torch.randn(4, 6, 250)).shape == (4, 3)
    bare = convert(StrokeEEG1DCNN((1, 24), 2), "none")
    assert not norm_layers(bare)


def test_a_batch_of_one_cannot_train_and_a_flat_example_is_refused():
    model = StrokeEEG1DCNN((1, 24), 2)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        model.train()(torch.randn(1, 1, 24))
    assert model.eval()(torch.randn(1, 1, 24)).shape == (1, 2)
    with pytest.raises(UserError, match=r"stroke-cnn takes \[channels, length >= 4\]"):
        StrokeEEG1DCNN((24,), 2)


# --- recordings


def test_band_powers_of_pure_tones():
    t = torch.arange(1024) / 256
    for i, (low, high) in enumerate(BANDS.values()):
        tone = torch.sin(2 * torch.pi * (low + high) / 2 * t)
        got = band_powers(torch.stack([tone, 5 * tone + 3]).unsqueeze(0), 256)
        assert got.shape == (1, 1, 8)
        assert (got.view(2, 4)[:, i] > 0.95).all()
        torch.testing.assert_close(got.sum(), torch.tensor(2.0))
    with pytest.raises(UserError, match="windows of 2 s or more at 60 Hz or more, not 1 s at 128 Hz"):
        band_powers(torch.zeros(1, 1, 128), 128)


class Raw:
    """A recording as MNE gives it: 3 s at 100 Hz in volts."""

    ch_names = ("C3", "C4")

    def __init__(self):
        self.info = {"sfreq": 100.0}

    def get_data(self, picks):
        return (np.arange(300)[None] + 1000 * self.ch_names.index(picks[0])) * 1e-6


@pytest.fixture
def recording(tmp_path, monkeypatch):
    module = types.ModuleType("mne.io")
    module.read_raw_edf = lambda path, verbose: Raw()
    monkeypatch.setitem(sys.modules, "mne", types.ModuleType("mne"))
    monkeypatch.setitem(sys.modules, "mne.io", module)
    path = tmp_path / "night.edf"
    path.touch()
    return path


def test_a_recording_becomes_windows_in_microvolts_in_the_order_asked_for(recording):
    x, rate = read_windows(recording, ["C4", "C3"], seconds=1, overlap=0.5)
    assert rate == 100
    assert x.shape == (5, 2, 100)
    assert x.dtype == torch.float32
    torch.testing.assert_close(x[1, :, 0], torch.tensor([1050.0, 50.0]))


def test_mistakes_with_recordings_are_named(recording, tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"unknown channel of night.edf 'C5'"):
        read_windows(recording, ["C5"], 1)
    with pytest.raises(UserError, match="lasts 3.0 s: choose windows of at most that"):
        read_windows(recording, ["C3"], 4)
    with pytest.raises(UserError, match="no recording at"):
        read_windows(tmp_path / "none.edf", ["C3"], 1)
    with pytest.raises(UserError, match="night.mat: not one of .edf, .bdf, .vhdr; export the recording as EDF"):
        read_windows(tmp_path / "night.mat", ["C3"], 1)
    monkeypatch.setitem(sys.modules, "mne.io", None)
    with pytest.raises(UserError, match=r"pip install 'fedbn\[eeg\]'"):
        read_windows(recording, ["C3"], 1)


# --- tables


@pytest.mark.parametrize(
    ("table", "rows", "width"), [("breast-cancer", 569, 30), ("wine", 178, 13), ("digits", 1797, 64)]
)
def test_tables_are_whole_and_standardised(table, rows, width):
    people = scenario(f"tabular:table={table}").load(0)
    x = torch.cat([torch.cat([u.train.x, u.test.x]) for u in people.users])
    assert x.shape == (rows, width)
    assert x.mean(0).abs().max() < 1e-5
    spread = x.std(0, unbiased=False)
    assert ((spread - 1).abs() < 1e-4)[spread > 0].all()


def test_neighbours_on_the_component_make_clients_alike_inside_and_unlike_each_other():
    def between(dealt):
        users = scenario(f"tabular:dealt={dealt}").load(0).users
        return torch.stack([u.train.x.mean(0) for u in users]).var(0).mean()

    assert between("component") > 5 * between("random")

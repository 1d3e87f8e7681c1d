"""The synthetic stroke cohort, its network, features of EEG recordings, and the scenario tabular."""

from __future__ import annotations

import json
import sys
import types

import numpy as np
import pytest
import torch
from torch import nn

from fedbn.data.eeg import read_windows
from fedbn.models.stroke_cnn import StrokeEEG1DCNN
from fedbn.nn.conversion import convert
from fedbn.nn.roles import norm_layers
from fedbn.scenarios.base import scenario
from fedbn.scenarios.stroke import BANDS, band_powers, cohort, read_cohort
from fedbn_simulations.claims.studies.stroke import CLASSICAL, _examples, folds
from tests.fedbn.helpers import rejects

# --- the cohort


def test_relative_powers_sum_to_one():
    data = cohort(62, 5, seed=3)
    assert data.x.shape == (310, 1, 24)
    torch.testing.assert_close(data.x.view(-1, 6, 4).sum(2), torch.ones(310, 6))
    assert (data.x > 0).all()
    assert data.y.float().mean() == 0.5
    assert data.subject.bincount().tolist() == [5] * 62


def test_cohort_is_determined_by_seed():
    assert torch.equal(cohort(10, 3, 1).x, cohort(10, 3, 1).x)
    assert not torch.equal(cohort(10, 3, 1).x, cohort(10, 3, 2).x)


def test_stroke_slows_one_hemisphere():
    data = cohort(2000, 2, seed=0)
    log = data.x.view(-1, 6, 4).log()
    slow = log[..., 0] - log[..., 2]  # delta minus alpha
    patients, controls = slow[data.y == 1], slow[data.y == 0]
    # The lesioned hemisphere is shifted by 1.2 times the severity, the other by 0.2 of that: the mean by 0.6 of it.
    severity = np.exp(0.3**2 / 2)
    assert float(patients[:, :4].mean() - controls[:, :4].mean()) == pytest.approx(1.2 * 0.6 * severity, rel=0.1)
    assert float(patients[:, 4:].mean() - controls[:, 4:].mean()) == pytest.approx(1.2 * 0.3 * severity, rel=0.2)
    # Left minus right: no difference on average, more variation in patients.
    difference = [s[:, 0] + s[:, 2] - s[:, 1] - s[:, 3] for s in (patients, controls)]
    assert abs(float(difference[0].mean())) < 0.1
    assert float(difference[0].std()) > 1.5 * float(difference[1].std())


def test_band_response_shifts_features_but_gain_does_not():
    plain = cohort(8, 2, 0)
    gain = cohort(8, 2, 0, torch.full((8, 6, 4), 0.7))
    torch.testing.assert_close(gain.x, plain.x)
    tilted = torch.zeros(8, 6, 4)
    tilted[:, :, 0] = 0.5
    assert (cohort(8, 2, 0, tilted).x.view(-1, 6, 4)[..., 0] > plain.x.view(-1, 6, 4)[..., 0]).all()


def test_hospitals_test_on_other_subjects():
    population = scenario("stroke").load(0)
    assert len(population.users) == 6
    seen = [set(u.train.recording.tolist()) | set(u.test.recording.tolist()) for u in population.users]
    assert sum(map(len, seen)) == len(set().union(*seen)) == 62
    for user in population.users:
        assert not set(user.train.recording.tolist()) & set(user.test.recording.tolist())
        assert set(user.test.y.tolist()) == set(user.train.y.tolist()) == {0, 1}
        assert user.test.y.float().mean() == 0.5


def spread(text, measure):
    """Mean over features of a measure of the spread between the users' means."""
    return measure(torch.stack([u.train.x.mean(0) for u in scenario(text).load(0).users]), 0).mean()


def test_amplifiers_shift_hospitals():
    assert spread("stroke", torch.std) > 1.5 * spread("stroke:response=0", torch.std)


def test_folds_keep_subjects_whole():
    data = cohort(62, 4, 0)
    test_rows = []
    for train, test in folds(data, 5, seed=0):
        assert not set(data.subject[train].tolist()) & set(data.subject[test].tolist())
        assert len(train) + len(test) == len(data.y)
        test_rows += test.tolist()
    assert sorted(test_rows) == list(range(len(data.y)))


def test_standardization_uses_training_rows_only():
    data = cohort(8, 4, 0)
    train, test = folds(data, 4, seed=0)[0]
    before = _examples(data, train, train).x
    data.x[test] *= 100
    assert torch.equal(_examples(data, train, train).x, before)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stroke:hospitals=8", "62 subjects in 8 hospitals: choose 2 hospitals or more, with 8 subjects each"),
        ("stroke:hospitals=1:unseen=0", "choose 2 hospitals or more"),
        ("stroke:epochs=0", "epochs=0: choose 1 or more"),
        ("stroke:unseen=6", "6 unseen of 6 users leaves no user"),
        ("tabular:users=1", "users=1: choose 2 to 71, breast-cancer has 569 rows"),
        ("tabular:table=wine:users=50", "choose 2 to 22, wine has 178 rows"),
        ("tabular:table=iris", "unknown value for scenario 'tabular', option 'table' 'iris'"),
    ],
)
def test_cohort_rejects_bad_options(text, message):
    rejects(message, lambda: scenario(text).load(0))


# --- the network


def test_cnn_has_bn_between_convolution_and_relu():
    layers = list(StrokeEEG1DCNN((1, 24), 2).features)
    for i, layer in enumerate(layers):
        if isinstance(layer, nn.Conv1d):
            assert isinstance(layers[i + 1], nn.BatchNorm1d)
            assert isinstance(layers[i + 2], nn.ReLU)
    assert sum(isinstance(m, nn.Conv1d) for m in layers) == 3


def test_cnn_accepts_features_and_windows():
    assert StrokeEEG1DCNN((1, 24), 2)(torch.randn(4, 1, 24)).shape == (4, 2)
    assert StrokeEEG1DCNN((6, 250), 3)(torch.randn(4, 6, 250)).shape == (4, 3)
    assert not norm_layers(convert(StrokeEEG1DCNN((1, 24), 2), "none"))


def test_cnn_rejects_single_rows_and_flat_examples():
    model = StrokeEEG1DCNN((1, 24), 2)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        model.train()(torch.randn(1, 1, 24))
    assert model.eval()(torch.randn(1, 1, 24)).shape == (1, 2)
    rejects(r"stroke-cnn takes \[channels, length >= 4\]", StrokeEEG1DCNN, (24,), 2)


# --- recordings


def test_band_powers_of_pure_tones():
    t = torch.arange(1024) / 256
    for i, (low, high) in enumerate(BANDS.values()):
        tone = torch.sin(2 * torch.pi * (low + high) / 2 * t)
        powers = band_powers(torch.stack([tone, 5 * tone + 3]).unsqueeze(0), 256)
        assert powers.shape == (1, 1, 8)
        assert (powers.view(2, 4)[:, i] > 0.95).all()
        torch.testing.assert_close(powers.sum(), torch.tensor(2.0))
    rejects("windows of 2 s or more at 60 Hz or more, not 1 s at 128 Hz", band_powers, torch.zeros(1, 1, 128), 128)


def test_band_powers_ignore_offset_and_drift():
    t = torch.arange(512) / 256
    tone = torch.sin(2 * torch.pi * 10 * t)
    powers = [band_powers((tone + slow).view(1, 1, -1), 256)[0, 0] for slow in (100 * torch.ones_like(t), 20 * t)]
    assert powers[0][2] > 0.99  # alpha
    assert powers[1][3] < 1e-4  # beta


class Raw:
    """Mock of an MNE recording: 3 s at 100 Hz in volts."""

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


def test_recording_windows_are_microvolts_in_channel_order(recording):
    x, rate = read_windows(recording, ["C4", "C3"], seconds=1, overlap=0.5)
    assert (rate, x.shape, x.dtype) == (100, (5, 2, 100), torch.float32)
    torch.testing.assert_close(x[1, :, 0], torch.tensor([1050.0, 50.0]))


def test_read_recording_rejects_bad_files(recording, tmp_path, monkeypatch):
    rejects(r"unknown channel of night.edf 'C5'", read_windows, recording, ["C5"], 1)
    rejects("lasts 3.0 s: choose shorter windows", read_windows, recording, ["C3"], 4)
    rejects("no recording at", read_windows, tmp_path / "none.edf", ["C3"], 1)
    message = "night.mat: not one of .edf, .bdf, .vhdr, .npz; export the recording as EDF"
    rejects(message, read_windows, tmp_path / "night.mat", ["C3"], 1)
    monkeypatch.setitem(sys.modules, "mne.io", None)
    rejects(r"pip install 'fedbn\[eeg\]'", read_windows, recording, ["C3"], 1)


def write_npz(path, is_patient, rng, rate=128.0, seconds=20):
    """Write a NumPy archive with two channels, slower in patients."""
    t = np.arange(int(seconds * rate)) / rate
    waves = [np.sin(2 * np.pi * frequency * t + rng.uniform(0, 6)) for frequency in (2, 10)]
    signal = [(1 + 2 * is_patient) * waves[0] + waves[1] + rng.normal(0, 0.5, len(t)) for _ in range(2)]
    np.savez(path, signal=10 * np.array(signal), rate=rate, channels=["F3", "F4"])


def test_npz_recording_becomes_windows(tmp_path):
    signal = np.arange(600.0).reshape(2, 300)
    np.savez(tmp_path / "a.npz", signal=signal, rate=100, channels=["C3", "C4"])
    x, rate = read_windows(tmp_path / "a.npz", ["C4", "C3"], 1)
    assert (rate, x.shape) == (100.0, (3, 2, 100))
    assert torch.equal(x[1, :, 0], torch.tensor([400.0, 100.0]))


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"signal": np.zeros((2, 9)), "rate": 9.0}, r"must hold signal \[channels, samples\] in microvolts"),
        ({"signal": np.array([{}]), "rate": 9.0, "channels": ["C3"]}, "as plain arrays"),
        ({"signal": np.zeros((3, 9)), "rate": 9.0, "channels": ["C3"]}, "does not fit 1 channels"),
        ({"signal": np.zeros((1, 9)), "rate": 0.0, "channels": ["C3"]}, "at 0 Hz"),
        ({"signal": np.full((1, 9), np.nan), "rate": 9.0, "channels": ["C3"]}, "not finite"),
        ({"signal": np.zeros((1, 9)), "rate": 9.0, "channels": ["C4"]}, "unknown channel of a.npz 'C3'"),
    ],
)
def test_npz_recording_rejects_bad_arrays(arrays, message, tmp_path):
    np.savez(tmp_path / "a.npz", **arrays)
    rejects(message, read_windows, tmp_path / "a.npz", ["C3"], 1)
    (tmp_path / "b.npz").write_bytes(b"no archive")
    rejects("b.npz must hold", read_windows, tmp_path / "b.npz", ["C3"], 1)


def write_edf(path, signal, rate, names):
    """Write a European Data Format file: fixed-width text headers, then 16-bit numbers, one record per second."""
    n, seconds = len(names), signal.shape[1] // rate
    scale = np.abs(signal).max()
    fields = [
        (8, "0"), *((80, t) for t in ["X X X X", "Startdate X X X X"]),
        *((8, t) for t in ["01.01.20", "00.00.00", str(256 * (n + 1))]),
        (44, ""), (8, str(seconds)), (8, "1"), (4, str(n)),
        *((16, f"EEG {name}"[:16]) for name in names), *((80, "") for _ in names), *((8, "uV") for _ in names),
        *((8, f"{-scale:.6g}"[:8]) for _ in names), *((8, f"{scale:.6g}"[:8]) for _ in names),
        *((8, "-32767") for _ in names), *((8, "32767") for _ in names), *((80, "") for _ in names),
        *((8, str(rate)) for _ in names), *((32, "") for _ in names),
    ]  # fmt: skip
    body = np.round(signal / scale * 32767).astype("<i2").reshape(n, seconds, rate).transpose(1, 0, 2)
    path.write_bytes("".join(text.ljust(width) for width, text in fields).encode("ascii") + body.tobytes())


def write_brainvision(path, signal, rate, names):
    """Write a BrainVision recording: header and marker files of text, and 32-bit floats."""
    path.with_suffix(".eeg").write_bytes(signal.T.astype("<f4").tobytes())
    path.with_suffix(".vmrk").write_text(
        "Brain Vision Data Exchange Marker File, Version 1.0\n[Common Infos]\nCodepage=UTF-8\n"
        f"DataFile={path.stem}.eeg\n[Marker Infos]\nMk1=New Segment,,1,1,0,20200101000000000000\n"
    )
    listed = "\n".join(f"Ch{i + 1}={name},,1,µV" for i, name in enumerate(names))
    path.write_text(
        "Brain Vision Data Exchange Header File Version 1.0\n[Common Infos]\nCodepage=UTF-8\n"
        f"DataFile={path.stem}.eeg\nMarkerFile={path.stem}.vmrk\nDataFormat=BINARY\nDataOrientation=MULTIPLEXED\n"
        f"NumberOfChannels={len(names)}\nSamplingInterval={1e6 / rate:g}\n[Binary Infos]\nBinaryFormat=IEEE_FLOAT_32\n"
        f"[Channel Infos]\n{listed}\n",
        encoding="utf-8",
    )


@pytest.mark.parametrize(("write", "name"), [(write_edf, "a.edf"), (write_brainvision, "a.vhdr")])
def test_mne_reads_same_windows_from_all_formats(write, name, tmp_path):
    pytest.importorskip("mne")
    signal = np.round(np.random.default_rng(0).normal(0, 20, (2, 300)), 3)
    path = tmp_path / name
    write(path, signal, 100, ["C3", "C4"])
    names = ["C4", "C3"] if path.suffix == ".vhdr" else ["EEG C4", "EEG C3"]
    x, rate = read_windows(path, names, 1)
    assert (rate, x.shape) == (100.0, (3, 2, 100))
    torch.testing.assert_close(x[2], torch.from_numpy(signal[::-1, 200:].copy()).float(), rtol=0, atol=0.01)
    path.with_stem("damaged").write_bytes(b"\x00\x01damaged")
    rejects("MNE cannot read damaged", read_windows, path.with_stem("damaged"), names, 1)


@pytest.fixture
def cohort_on_disk(tmp_path):
    """Table of six subjects with one recording each, and a second one of the first subject."""
    rng = np.random.default_rng(0)
    lines = ["file,subject,label"]
    for i in range(7):
        write_npz(tmp_path / f"r{i}.npz", i % 2, rng)
        lines.append(f"r{i}.npz,P{i % 6},{i % 2}")
    (tmp_path / "cohort.csv").write_text("\n".join(lines).replace("P0,1", "P1,1"))
    return tmp_path / "cohort.csv"


def test_read_cohort_builds_examples(cohort_on_disk):
    data, names = read_cohort(cohort_on_disk, ["F4", "F3"], seconds=4)
    assert names == tuple(f"P{i}" for i in range(6))
    assert data.x.shape == (35, 1, 8)
    assert data.subject.bincount().tolist() == [10, 5, 5, 5, 5, 5]
    assert data.y[data.subject == 3].tolist() == [1] * 5
    delta, alpha = data.x[:, 0, 0], data.x[:, 0, 2]
    assert (delta[data.y == 1] > alpha[data.y == 1]).all()
    assert (delta[data.y == 1].min() > delta[data.y == 0].max()).all()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty or lacks file, label, subject"),
        ("file,subject\nr0.npz,P0\n", "lacks label"),
        ("file,subject,label\nr0.npz,P0,2\n", "line 2: label '2' of subject 'P0': use 1"),
        ("file,subject,label\nr0.npz,P0,0\nr1.npz,P0,1\n", "line 3: label '1' of subject 'P0'"),
        ("file,subject,label\nr0.npz,P0,0\nr2.npz,P1,0\n", "fewer than two patients"),
        ("file,subject,label\nr1.npz,P1,1\nr0.npz,P0,0\nr2.npz,P2,0\n", "fewer than two patients"),
        ("file,subject,label\nr0.npz,P0,0\nr1.npz,P1,1\nr3.npz,P3,1\n", "fewer than two controls"),
        ("file,subject,label\nnone.npz,P0,0\n", "no recording at"),
    ],
)
def test_read_cohort_rejects_bad_table(text, message, cohort_on_disk):
    cohort_on_disk.write_text(text)
    rejects(message, read_cohort, cohort_on_disk, ["F3"])
    rejects("no table at", lambda: read_cohort(cohort_on_disk.with_name("none.csv"), ["F3"]))


@pytest.mark.slow
def test_eeg_command_classifies_recordings(cohort_on_disk, run_cli):
    code, out, err = run_cli("eeg", cohort_on_disk, "--channels", "F3,F4", "--epochs", "1", "--json")
    assert code == 0, err
    result = json.loads(out)
    assert (result["subjects"], result["windows"], result["folds"]) == (6, 35, 6)
    assert result["scores"]["SVM"]["accuracy"] == 1.0
    assert set(result["scores"]) == {"1-D CNN with BN", "1-D CNN without", *CLASSICAL}
    _, out, _ = run_cli("eeg", cohort_on_disk, "--channels", "F3", "--epochs", "1", "--folds", "3")
    assert "6 subjects, 3 folds" in out
    for arguments, message in (
        (["--channels", " , "], "give at least one channel"),
        (["--channels", "F3", "--folds", "7"], "folds=7: choose 2 to 6"),
        (["--channels", "O1"], "unknown channel of r0.npz 'O1'"),
    ):
        code, _, err = run_cli("eeg", cohort_on_disk, *arguments)
        assert code == 2
        assert message in err


# --- tables


@pytest.mark.parametrize(
    ("table", "rows", "width"), [("breast-cancer", 569, 30), ("wine", 178, 13), ("digits", 1797, 64)]
)
def test_tables_are_complete_and_standardized(table, rows, width):
    population = scenario(f"tabular:table={table}").load(0)
    x = torch.cat([part.x for u in population.users for part in (u.train, u.test)])
    assert x.shape == (rows, width)
    assert x.mean(0).abs().max() < 1e-5
    std = x.std(0, unbiased=False)
    assert ((std - 1).abs() < 1e-4)[std > 0].all()


def test_pca_shards_are_homogeneous_within_clients():
    between = {d: spread(f"tabular:dealt={d}", torch.var) for d in ("component", "random")}
    assert between["component"] > 5 * between["random"]

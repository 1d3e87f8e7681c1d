r"""Stroke: a *synthetic* cohort of EEG and EOG band powers. There are no patients; all numbers are generated.

Giri, Fanany, Arymurthy (2016, https://arxiv.org/abs/1610.01757) distinguish stroke patients from controls by 24
features of EEG and EOG. Their data are private and their features were not available to us. This generator has the size
of their cohort and the physiology of their abstract: less blood flow slows the EEG.

For subject :math:`i`, epoch :math:`e`, channel :math:`c` (F3, F4, T3, T4, EOG left, EOG right) and band :math:`k`
(delta 0.5-4, theta 4-8, alpha 8-13, beta 13-30 Hz) the logarithm of the power is

.. math:: b_{ck} + u_{ik} + v_{ick} + \varepsilon_{ieck} + s_i\,h_{ic}\,d_k + g_{ck}

with :math:`b` typical powers; :math:`u, v` effects of the subject (normal, 0.5 and 0.15); :math:`\varepsilon` noise of
an epoch (0.3); :math:`d = (0.6, 0.4, -0.6, -0.3)` the slowing; :math:`s_i` the severity (0 for controls, log-normal
around 1 with sigma 0.3 for patients); :math:`h_{ic}` = 1 in the lesioned hemisphere, drawn per patient, 0.2 in the
other, and half of that in EOG channels. So much of the difference between patients and controls is a *difference
between the hemispheres with unknown sign*, which no linear function of the features can detect. :math:`g` is the
frequency response of the hospital's amplifier and electrodes (normal, ``response``), the feature skew between clients.
The 24 features are powers relative to the total of their channel.
"""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from fedbn.data.eeg import read_windows
from fedbn.data.population import Examples, Population, User, hold_out
from fedbn.errors import UserError
from fedbn.scenarios.base import Scenario
from fedbn.seeds import numpy_generator

CHANNELS = ("F3", "F4", "T3", "T4", "EOG left", "EOG right")
BANDS = {"delta": (0.5, 4.0), "theta": (4.0, 8.0), "alpha": (8.0, 13.0), "beta": (13.0, 30.0)}

_TYPICAL = np.log(np.array([[1.0, 0.6, 0.8, 0.5]] * 4 + [[3.0, 0.5, 0.3, 0.3]] * 2))
_SLOWING = np.array([0.6, 0.4, -0.6, -0.3])
_SIDE = np.array([0, 1, 0, 1, 0, 1])
_CHANNEL_EFFECT = np.array([1.0, 1.0, 1.0, 1.0, 0.5, 0.5])


@dataclass(frozen=True)
class Cohort:
    """Epochs of all subjects, subject by subject.

    Attributes:
        x: relative powers, ``[n, 1, 24]`` float32; the four bands of the first channel come first.
        y: 1 for stroke, 0 for controls, ``[n]`` int64.
        subject: index of the subject, ``[n]`` int64.
    """

    x: Tensor
    y: Tensor
    subject: Tensor


def cohort(subjects: int, epochs: int, seed: int, response: Tensor | None = None) -> Cohort:
    """Generate alternating stroke and control subjects by the formula of this module.

    Args:
        subjects: number of subjects.
        epochs: number of epochs per subject.
        seed: random seed.
        response: frequency response of the amplifier, ``[subjects, 6, 4]``, added to the log powers; default zero.

    >>> data = cohort(4, 3, seed=0)
    >>> data.x.shape, data.y.tolist(), data.x[0, 0, :4].sum().item()
    (torch.Size([12, 1, 24]), [1, 1, 1, 0, 0, 0, 1, 1, 1, 0, 0, 0], 1.0)
    """
    rng = numpy_generator(seed, "stroke cohort")
    is_patient = np.arange(subjects) % 2 == 0
    severity = np.where(is_patient, rng.lognormal(0.0, 0.3, subjects), 0.0)
    lesion = rng.integers(0, 2, subjects)
    effect = np.where(lesion[:, None] == _SIDE, 1.0, 0.2) * _CHANNEL_EFFECT
    subject_mean = (
        _TYPICAL
        + rng.normal(0, 0.5, (subjects, 1, 4))
        + rng.normal(0, 0.15, (subjects, 6, 4))
        + severity[:, None, None] * effect[:, :, None] * _SLOWING
    )
    if response is not None:
        subject_mean = subject_mean + response.double().numpy()
    log_power = subject_mean[:, None] + rng.normal(0, 0.3, (subjects, epochs, 6, 4))
    power = np.exp(log_power)
    relative = power / power.sum(-1, keepdims=True)
    rows = np.repeat(np.arange(subjects), epochs)
    return Cohort(
        torch.from_numpy(relative.reshape(-1, 1, 24).astype(np.float32)),
        torch.from_numpy(is_patient[rows].astype(np.int64)),
        torch.from_numpy(rows),
    )


def band_powers(windows: Tensor, rate: float) -> Tensor:
    """Compute the features of this scenario from recorded windows.

    Args:
        windows: ``[n, channels, samples]``, at least two seconds.
        rate: sampling rate in Hz.

    Returns:
        Powers in `BANDS` relative to their sum, ``[n, 1, 4 * channels]``; the bands of the first channel come first.

    Raises:
        UserError: if the windows are too short or the rate is too low for the bands.

    >>> t = torch.arange(512) / 128
    >>> band_powers(torch.sin(2 * torch.pi * 10 * t).view(1, 1, -1), 128).round(decimals=3).tolist()
    [[[0.0, 0.0, 1.0, 0.0]]]
    """
    n = windows.shape[-1]
    if n < 2 * rate or rate < 2 * 30:
        raise UserError(
            f"band powers need windows of 2 s or more at 60 Hz or more, not {n / rate:g} s at {rate:g} Hz: use longer "
            "windows"
        )
    # A Hann window prevents slow drifts from leaking into the higher bands.
    tapered = (windows - windows.mean(-1, keepdim=True)) * torch.hann_window(n)
    power = torch.fft.rfft(tapered).abs() ** 2
    frequency = torch.fft.rfftfreq(n, 1 / rate)
    bands = torch.stack(
        [power[..., (low <= frequency) & (frequency < high)].sum(-1) for low, high in BANDS.values()], -1
    )
    return (bands / bands.sum(-1, keepdim=True).clamp_min(torch.finfo(bands.dtype).tiny)).flatten(1).unsqueeze(1)


def read_cohort(
    table: str | Path, channels: Sequence[str], seconds: float = 4.0, overlap: float = 0.0
) -> tuple[Cohort, tuple[str, ...]]:
    """Read a cohort of real recordings and compute band powers of windows, in the format of the synthetic cohort.

    Args:
        table: CSV with the columns ``file`` (relative to the table; see `fedbn.data.eeg.read_windows`), ``subject``
            and ``label`` (1 for patients, 0 for controls), one line per recording.
        channels: names of the channels, in the order of the output.
        seconds: length of a window.
        overlap: fraction of a window that overlaps with the next one.

    Returns:
        The cohort and the names of the subjects.

    Raises:
        UserError: if the table does not exist, a column is missing, a value is invalid, there are fewer than two
            patients or controls, or a recording cannot be used.
    """
    table = Path(table)
    if not table.is_file():
        raise UserError(f"no table at {table}: write a CSV with the columns file, subject, label")
    with table.open(newline="", encoding="utf-8-sig") as text:
        lines = list(csv.DictReader(text))
    missing = {"file", "subject", "label"} - set(lines[0] if lines else ())
    if missing:
        raise UserError(
            f"{table.name} is empty or lacks {', '.join(sorted(missing))}: write the columns file, subject, label"
        )
    names = tuple(dict.fromkeys(line["subject"] for line in lines))
    label: dict[str, str] = {}
    parts = []
    for number, line in enumerate(lines, 2):
        name, value = line["subject"], (line["label"] or "").strip()
        if value not in ("0", "1") or label.setdefault(name, value) != value:
            raise UserError(
                f"{table.name}, line {number}: label {value!r} of subject {name!r}: use 1 (patient) or 0 (control), "
                "the same in all lines of a subject"
            )
        windows, rate = read_windows(table.parent / line["file"], channels, seconds, overlap)
        powers = band_powers(windows, rate)
        parts.append(
            Cohort(powers, torch.full((len(powers),), int(value)), torch.full((len(powers),), names.index(name)))
        )
    for value, kind in (("1", "patients"), ("0", "controls")):
        if list(label.values()).count(value) < 2:
            raise UserError(
                f"{table.name} has fewer than two {kind}: add one, since one is held out and one is for training"
            )
    return Cohort(*(torch.cat([getattr(p, k) for p in parts]) for k in ("x", "y", "subject"))), names


@dataclass(frozen=True)
class Stroke(Scenario):
    """Hospitals with a few subjects each; a quarter of each hospital's subjects are for testing.

    Attributes:
        unseen: number of hospitals that never train.
        hospitals: number of hospitals (clients).
        subjects: total number of subjects, half of them with stroke.
        epochs: number of epochs per subject.
        response: standard deviation of a hospital's frequency response, in log power.
    """

    name: ClassVar[str] = "stroke"
    about: ClassVar[str] = "synthetic EEG/EOG powers, 62 made-up subjects, 6 hospitals"
    model: ClassVar[str] = "stroke-cnn"
    plan: ClassVar[dict[str, object]] = {"rounds": 20, "local_epochs": 2, "batch_size": 16, "lr": 0.05, "momentum": 0.9}

    unseen: int = 1
    hospitals: int = 6
    subjects: int = 62
    epochs: int = 20
    response: float = 0.35

    def load(self, seed: int) -> Population:
        if self.hospitals < 2 or self.subjects < 8 * self.hospitals:
            raise UserError(
                f"{self.subjects} subjects in {self.hospitals} hospitals: choose 2 hospitals or more, with 8 subjects "
                "each or more, so that every hospital has both groups in training and test data"
            )
        if self.epochs < 1:
            raise UserError(f"epochs={self.epochs}: choose 1 or more")
        # A patient and a control form a pair in the same hospital, so that labels are balanced.
        hospital_of = torch.arange(self.subjects) // 2 % self.hospitals
        rng = numpy_generator(0, "stroke", "amplifiers")
        amplifiers = torch.from_numpy(rng.normal(0, self.response, (self.hospitals, 6, 4)))
        data = cohort(self.subjects, self.epochs, 0, amplifiers[hospital_of])
        users = []
        for hospital in range(self.hospitals):
            subjects = (hospital_of == hospital).nonzero()[:, 0]
            rows = torch.isin(data.subject, subjects)
            is_test = torch.isin(data.subject, subjects[-2 * max(1, len(subjects) // 8) :])
            train, test = (
                Examples(data.x[part], data.y[part], data.subject[part]) for part in (rows & ~is_test, rows & is_test)
            )
            users.append(User(f"hospital{hospital + 1}", "synthetic", train, test))
        return Population(
            users=tuple(users),
            unseen=hold_out(self.hospitals, self.unseen, seed),
            classes=("control", "stroke"),
            skew="synthetic feature skew: each hospital's amplifier has a frequency response; labels balanced",
            sources={"generated/stroke": hashlib.sha256(data.x.numpy().tobytes()).hexdigest()},
        )

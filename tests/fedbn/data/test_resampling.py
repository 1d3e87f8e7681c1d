from __future__ import annotations

import numpy as np

from fedbn.data.resampling import Samples, resample


def samples(t, values, labels=None):
    return Samples(
        t, np.asarray(values, float).reshape(len(t), -1), np.zeros(len(t), int) if labels is None else labels
    )


def test_resample_leaves_samples_at_the_rate_as_they_are():
    t = 1_547_251_200 + np.arange(200) / 50  # seconds since 1970
    x = np.random.default_rng(0).normal(size=(200, 3))
    found = resample(samples(t, x, np.arange(200) // 50), 50)
    np.testing.assert_allclose(found.values, x, atol=1e-4)
    assert found.labels.tolist() == (np.arange(200) // 50).tolist()


def test_resample_removes_what_the_rate_cannot_represent():
    t = np.arange(2000) / 100
    slow, fast = np.sin(2 * np.pi * 3 * t), np.sin(2 * np.pi * 45 * t)
    found = resample(samples(t, np.stack([5 + slow, fast], 1)), 50)
    inner = slice(50, -50)
    assert np.abs(found.values[inner, 0] - 5 - slow[::2][inner]).max() < 0.01
    assert np.abs(found.values[inner, 1]).max() < 0.05, "without a filter, it appears as 5 Hz"


def test_resample_interpolates_short_and_keeps_long_gaps():
    t = np.arange(300) / 100
    x = t.copy()
    x[100:110] = np.nan
    x[200:250] = np.nan
    found = resample(samples(t, x), 100)
    assert len(found.times) == 250
    np.testing.assert_allclose(found.values[:, 0], found.times, atol=1e-6)
    assert np.flatnonzero(np.diff(found.times) > 0.011).tolist() == [199]


def test_resample_starts_again_where_time_goes_back():
    t = np.r_[np.arange(50), np.arange(50)] / 50
    found = resample(samples(t, np.repeat([0.0, 1.0], 50)), 50)
    assert found.values[:, 0].tolist() == [0.0] * 50 + [1.0] * 50
    assert len(resample(samples(np.array([0.0, 0.0, np.nan]), [1.0, 2.0, 3.0]), 50).times) == 0

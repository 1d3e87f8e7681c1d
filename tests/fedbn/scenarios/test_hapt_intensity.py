from __future__ import annotations

import numpy as np
import torch

from fedbn.scenarios import hapt, hapt_intensity
from fedbn.scenarios.base import scenario
from fedbn.scenarios.wearable import WearableScenario
from fedbn.seeds import numpy_generator


def test_intensity_is_deviation_of_norm_of_acceleration(monkeypatch):
    signal = numpy_generator(0, "signal").normal(size=(200, 6)).astype(np.float32)
    recording = np.repeat([0, 1], 100)
    rows = {"signal": signal, "label": np.zeros(200, np.int8), "user": np.ones(200), "recording": recording}
    users = hapt_intensity.HaptIntensity(window=50).split(rows | {"stretch": recording}, 50)
    ((number, user),) = users
    assert (number, len(user.train), len(user.test)) == (1, 2, 2)
    for data, start in ((user.train, 0), (user.test, 100)):
        for x, y, first in zip(data.x, data.y, (start, start + 50), strict=True):
            piece = signal[first : first + 50]
            norm = np.sqrt((piece[:, :3].astype(float) ** 2).sum(1))
            np.testing.assert_allclose(float(y), 1000 * np.abs(norm - norm.mean()).mean(), rtol=1e-5)
            assert np.array_equal(x.numpy(), piece[:, 3:].T)


def test_intensity_has_users_and_windows_of_hapt():
    assert issubclass(hapt_intensity.HaptIntensity, hapt.Hapt)
    assert hapt_intensity.HaptIntensity.source == "hapt"
    assert issubclass(hapt.Hapt, WearableScenario)
    assert scenario("hapt-intensity").unseen == scenario("hapt").unseen
    assert torch.tensor(0.0) == hapt_intensity.amplitude_deviation(torch.ones(1, 3, 9))

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedbn.data.windows import hop, windows
from tests.fedbn.helpers import rejects


@given(st.integers(8, 400), st.floats(0, 0.999))
def test_hop_is_nearest_whole_number_of_samples(window, overlap):
    step = hop(window, overlap)
    assert step >= 1
    assert step == 1 or abs(step - window * (1 - overlap)) <= 0.5


@pytest.mark.parametrize(("window", "overlap", "step"), [(10, 0.25, 8), (10, 1 / 3, 7), (100, 0.016, 98), (8, 0.99, 1)])
def test_hop_rounds(window, overlap, step):
    assert hop(window, overlap) == step


def test_hop_rejects_bad_input():
    assert hop(8, 0) == 8
    rejects("window=7 is too short", hop, 7, 0.5)
    rejects("overlap=1.0 must be at least 0 and below 1", hop, 8, 1.0)
    rejects("overlap=-0.1 must be at least 0", hop, 8, -0.1)


@given(st.integers(1, 60), st.integers(1, 12), st.integers(1, 12))
def test_windows_are_all_complete_windows(n, window, step):
    signal = torch.arange(2.0 * n).view(n, 2)
    starts = [i for i in range(0, n, step) if i + window <= n]
    cut = windows(signal, window, step)
    assert cut.shape == (len(starts), 2, window)
    assert all(torch.equal(rows, signal[i : i + window].T) for rows, i in zip(cut, starts, strict=True))

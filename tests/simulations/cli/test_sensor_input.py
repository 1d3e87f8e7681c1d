"""Data of worn sensors on the command line: mistakes are one sentence, before training starts."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from rich.console import Console

from fedbn.data.population import hold_out
from fedbn.online.alignments import quaternions as so3
from fedbn_simulations.cli import app as cli
from tests.fedbn.online.alignments.data import windows

USERS = 6
UNSEEN = hold_out(USERS, 1, 0)[0]
QUICK = ["--model", "har-cnn", "--rounds", "1", "--streams", "natural", "--seeds", "1"]


@pytest.fixture
def adapt(tmp_path, run_cli, monkeypatch):
    """A function that changes the recordings of one of six people and runs ``fedbn adapt`` on all."""
    monkeypatch.setattr(cli, "errors", Console(stderr=True, width=1000))

    def run(change=lambda x, y: (x, y), user=UNSEEN, columns="unseen=1:triples=0+1+2+3+4+5", rules="rotation"):
        parts = []
        for i in range(USERS):
            turn = so3.from_vector(0.2 * torch.randn(3, generator=torch.Generator().manual_seed(i)))
            x, y = (t.numpy() for t in windows(48, i, q=turn))
            parts.append(change(x, y) if i == user else (x, y))
        x, y = map(np.concatenate, zip(*parts, strict=True))
        np.savez(tmp_path / "worn.npz", x=x, y=y, user=np.repeat(np.arange(USERS), [len(own) for _, own in parts]))
        return run_cli("adapt", "--data", "worn.npz", "--columns", columns, *QUICK, "--rules", rules)

    return run


def in_other_unit(x, y):
    return 9.81 * x, y


def saturated(x, y):
    x[:, 0] = np.linspace(-4, 4, x.shape[2]).clip(-2, 2)
    return x, y


def of_one_class(x, y):
    return x[y == 0], y[y == 0]


def of_a_new_class(x, y):
    return x, np.where(y == 3, 4, y)


def with_nan(x, y):
    x[-3, 2, 5] = np.nan
    return x, y


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"columns": "unseen=1"}, "set triples of its Population or of scenario files (triples=0+1+2)"),
        ({"columns": "unseen=1:triples=0+1+6"}, "must name three channels of each sensor once"),
        (
            {"change": with_nan},
            "x holds 1 NaN or infinite values (first: row 45, position 2, 5); remove or",
        ),
        ({"change": in_other_unit, "user": (UNSEEN + 1) % USERS}, "use one unit for all of them (1 g is 9.81 m/s2)"),
        ({"change": in_other_unit}, f"user '{UNSEEN}': a mean acceleration is"),
        ({"change": in_other_unit, "rules": "auto"}, f"user '{UNSEEN}': every channel varies at least 8.11 times"),
    ],
)
def test_bad_sensor_data_are_refused_in_one_sentence(options, message, adapt):
    code, _, errors = adapt(**options)
    assert code == 2
    assert message in errors
    assert "Traceback" not in errors


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (saturated, f"accelerations of user {UNSEEN} are saturated in more than"),
        (of_one_class, ""),
        (of_a_new_class, ""),
    ],
)
def test_unusual_sensor_data_run(change, message, adapt):
    code, output, errors = adapt(change)
    assert code == 0, errors
    assert "rotation" in output
    assert message in output + errors

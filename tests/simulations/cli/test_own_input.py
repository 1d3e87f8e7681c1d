"""Objects of the user on the command line: mistakes are one sentence, before training starts."""

from __future__ import annotations

import re

import numpy as np
import pytest
from rich.console import Console

from fedbn_simulations.cli import app as cli

MODULE = """
import torch
from torch import nn
from torch.utils.data import Dataset

class Growing(Dataset):
    def __len__(self):
        return 4
    def __getitem__(self, i):
        return torch.zeros(3 + i), 0

def growing():
    return {"ana": (Growing(), Growing())}

def halves(x, generator):
    return x.half()

def shorter(x, generator):
    return x[:, :2]

def broken(outputs, y):
    return "high"

def net(classes):
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, classes))

linear = nn.Linear(3, 2)

def deep(classes):  # with a huge step, the product of the last two layers overflows with every kernel
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 8), nn.Linear(8, classes))
"""

QUICK = ["--strategies", "fedbn", "--seeds", "1", "--rounds", "2", "--batch-size", "8", "--workers", "1"]


@pytest.fixture
def own(tmp_path, run_cli, monkeypatch):
    rng = np.random.default_rng(0)
    y, user = np.arange(72) % 3, np.arange(72) // 24
    x = rng.normal(size=(72, 3)).astype(np.float32)
    np.savez(tmp_path / "classes.npz", x=x, y=y, user=user)
    np.savez(tmp_path / "ages.npz", x=x, y=x[:, 0] + 40.5, user=user)
    (tmp_path / "own_input.py").write_text(MODULE)
    monkeypatch.setattr(cli, "errors", Console(stderr=True, width=1000))
    return run_cli


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "ages.npz"], "labels are real numbers"),
        (["--data", "ages.npz"], "choose --task regression"),
        (["--data", "ages.npz", "--task", "multilabel"], "choose --task regression, or correct the targets"),
        (["--data", "classes.npz", "--metric", "mea"], "unknown metric"),
        (["--data", "classes.npz", "--metric", "own_input:broken"], "must return a number, not a str"),
        (["own_input:growing"], "train item 1 is float32 of shape [4], but the first item of the data is float32 of"),
        (["--data", "classes.npz", "--augment", "own_input:halves"], "into [4, 3] float16: it must return the same"),
        (["--data", "classes.npz", "--augment", "own_input:shorter"], "into [4, 2] float32: it must return the same"),
        (["--data", "classes.npz", "--model", "own_inputs:net"], "cannot import 'own_inputs'"),
        (["--data", "classes.npz", "--model", "own_input:linear"], "is a model, not a factory: name a function"),
        (
            ["--data", "classes.npz", "--model", "memory:Net-0123456789ab"],
            "object that this process does not have",
        ),
    ],
)
def test_own_input_is_refused_in_one_sentence(arguments, message, own, tmp_path):
    code, _, errors = own("compare", *arguments, *QUICK)
    assert code == 2
    assert message in errors
    assert "Traceback" not in errors
    assert not list(tmp_path.rglob("result.json"))


@pytest.mark.slow
def test_diverged_training_names_client_and_round(own):
    code, out, errors = own("compare", "--data", "classes.npz", "--model", "own_input:deep", *QUICK, "--lr", "3e38")
    assert code == 0, errors
    text = " ".join(f"{out} {errors}".split())
    assert re.search(r"training diverged: the loss of .* became NaN or infinite in round \d", text), text

"""Errors of a user's network or device show one sentence and leave no files; audit accepts a split of the network."""

from __future__ import annotations

import json

import pytest

DATA = "digits8:users=3:unseen=1:images=300"

MODELS = """
from torch import nn

def wide(shape, classes):
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, classes))

class Pair(nn.Module):
    def __init__(self, shape, classes):
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8))
        self.head, self.head2 = nn.Linear(8, classes), nn.Linear(8, classes)

    def forward(self, x):
        h = self.body(x)
        return self.head(h), self.head2(h)
"""


@pytest.mark.parametrize(
    "command",
    [
        ("compare", DATA, "--strategies", "fedbn", "--out", "o"),
        ("adapt", DATA, "--out", "o"),
        ("deploy", DATA, "--out", "o"),
        ("leakage", DATA),
        ("serve", DATA, "--store", "users.db"),
    ],
    ids=lambda command: command[0],
)
@pytest.mark.parametrize(
    ("option", "message"),
    [
        (("--device", "cuda:99"), "device 'cuda:99' cannot be used here"),
        (("--model", "broken:wide"), "does not take examples of shape [1, 8, 8]"),
        pytest.param(("--model", "broken:Pair"), "returns several outputs", marks=pytest.mark.slow),
    ],
    ids=("device", "shape", "outputs"),
)
def test_bad_network_or_device_leaves_nothing(command, option, message, run_cli, tmp_path):
    (tmp_path / "broken.py").write_text(MODELS)
    code, out, errors = run_cli(*command, *option)
    assert (code, out) == (2, "")
    assert message in errors
    assert {p.name for p in tmp_path.iterdir()} <= {"broken.py", "__pycache__"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--rules", "atp"), "needs a model with learned adaptation rates"),
        (("--strategies", "groupnorm"), "has no layer that keeps any"),
        (("--strategies", "local"), "shares no model"),
        (("--private", "body"), "unknown layer for private 'body'"),
        (("--out", "taken"), "cannot write to taken"),
    ],
)
def test_adapt_finds_errors_before_training(arguments, message, run_cli, tmp_path):
    (tmp_path / "taken").write_text("")
    code, _, errors = run_cli("adapt", DATA, *(() if "--out" in arguments else ("--out", "o")), *arguments)
    assert code == 2
    assert message in errors
    assert [p.name for p in tmp_path.iterdir()] == ["taken"]


def test_audit_accepts_crossed_strategies_and_a_split(run_cli, tmp_path):
    (tmp_path / "broken.py").write_text(MODELS)

    def owners(*options):
        code, out, errors = run_cli("audit", "broken:Pair", "--shape", "1,8,8", "--json", *options)
        assert code == 0, errors
        return {e["key"]: e["owner"] for e in json.loads(out)["entries"]}

    by_head = owners("--strategy", "fedbn+fedper", "--head", "head2")
    assert {k for k, o in by_head.items() if o == "local"} == {
        *(k for k in by_head if k.startswith(("body.2", "head2"))),
    }
    assert by_head["head.weight"] == "shared"
    private = owners("--head", "head", "--private", "body.1,head")
    assert {k for k, o in private.items() if o == "local"} == {
        "body.1.weight",
        "body.1.bias",
        "head.weight",
        "head.bias",
        "body.2.num_batches_tracked",
    }
    code, _, errors = run_cli("audit", "broken:Pair", "--shape", "1,8,8", "--head", "hed")
    assert code == 2
    assert "unknown layer for head 'hed'. Did you mean 'head'" in errors

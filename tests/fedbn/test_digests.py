"""Digests depend on the content of objects, and on nothing else."""

from __future__ import annotations

import functools
import subprocess
import sys
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import nn

from fedbn.digests import digest, importable_name
from fedbn.errors import UserError
from tests.helpers import PYTHONPATH


def scaled(factor):
    return lambda x: x * factor


def defined(source):
    """Objects of a script or notebook that consists of ``source``."""
    namespace = {"__name__": "__main__"}
    exec(source, namespace)
    return namespace


NET = """
WIDTH = 8
def layer(width): return width * 2
class Net:
    depth = 2
    def __init__(self): self.width = layer(WIDTH)
    @property
    def size(self): return self.width
"""


@dataclass(frozen=True)
class Options:
    alpha: float
    names: tuple = ("a", "b")


@pytest.mark.parametrize(
    ("value", "other"),
    [
        (1, 1.0),
        (True, 1),
        ("1", 1),
        ([1, [2]], [[1], 2]),
        ({"a": 1, "b": 2}, {"a": 2, "b": 1}),
        ({1, 2}, {1, 3}),
        (np.zeros(4, np.float32), np.zeros(4, np.int32)),
        (np.zeros((2, 3)), np.zeros((3, 2))),
        (torch.zeros(3), torch.ones(3)),
        (scaled(2), scaled(3)),
        (functools.partial(scaled, 2), functools.partial(scaled, 3)),
        (Options(0.1), Options(0.2)),
        (lambda x: x + 1, lambda x: x + 2),
        (lambda x: x.sum(), lambda x: x.mean()),
    ],
)
def test_digest_differs_for_different_content(value, other):
    assert digest(value) != digest(other)


def test_digest_is_equal_for_equal_content():
    for make in (
        lambda: {"b": [1, 2.5], "a": None},
        lambda: {"z", "y", "x"},
        lambda: np.arange(6).reshape(2, 3)[:, ::2],
        lambda: scaled(2),
        lambda: Options(0.1),
        lambda: nn.BatchNorm1d(3),
    ):
        assert digest(make()) == digest(make())
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1})


@pytest.mark.parametrize(
    "change",
    [("WIDTH = 8", "WIDTH = 9"), ("width * 2", "width * 3"), ("depth = 2", "depth = 3"), ("self.width\n", "3\n")],
)
def test_digest_of_a_notebook_class_includes_what_it_refers_to(change):
    before, after = defined(NET), defined(NET.replace(*change))
    assert digest(before["Net"]) == digest(defined(NET)["Net"])
    assert digest(before["Net"]) != digest(after["Net"])


def test_digest_of_a_module_includes_weights_and_settings():
    def net(weight=0.0, eps=1e-5, frozen=False):
        model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2, eps=eps))
        nn.init.constant_(model[0].weight, weight)
        nn.init.zeros_(model[0].bias)
        model[0].weight.requires_grad_(not frozen)
        return model

    first = digest(net())
    assert digest(net().eval()) == first
    assert len({first, digest(net(1.0)), digest(net(eps=1e-3)), digest(net(frozen=True))}) == 4


def test_digest_is_equal_in_other_processes(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        NET + "def check(x): return x in {'one', 'two', 'three'}\n"
        "from fedbn.digests import digest\nprint(digest(Net), digest(check))"
    )
    found = {
        subprocess.run(
            [sys.executable, script],
            env={"PYTHONPATH": PYTHONPATH, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(found) == 1


def test_importable_name_requires_a_name_in_a_module():
    assert importable_name(Options) == "tests.fedbn.test_digests:Options"
    assert importable_name(nn.Linear) == "torch.nn.modules.linear:Linear"
    assert importable_name(scaled(2)) == ""
    assert importable_name(Options(0.1)) == ""
    assert importable_name(defined(NET)["Net"]) == ""


def test_digest_refuses_objects_without_content():
    with pytest.raises(UserError, match="a generator cannot be identified by its content"):
        digest(i for i in range(3))

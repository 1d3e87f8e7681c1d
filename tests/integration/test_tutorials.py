"""The commands of each page succeed, line by line; here with one round and one seed."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from fedbn_simulations.cli import app as cli
from tests.commands import commands_in

DOCS = Path(__file__).parents[2] / "docs"
PAGES = [
    *(DOCS / f"{name}.md" for name in ("index", "own", "privacy", "faq")),
    *sorted((DOCS / "tutorials").glob("*.md")),
]
SMALL = {
    "compare": ["--rounds", "1", "--seeds", "1", "--eval-every", "1", "--workers", "1", "--quiet"],
    "adapt": ["--rounds", "1", "--seeds", "1", "--quiet"],
    "claims": ["--seeds", "2", "--workers", "1"],
}
FEWER = {"hapt": "hapt:reserved=15", "watch": "watch:reserved=4", "digits": "digits:train=64:test=32"}
"""Scenarios with half of their users, or with few images."""
FOLLOWED = {"hapt": "hapt:unseen=2:reserved=22", "watch": "watch:unseen=1:reserved=6"}
"""Scenarios of studies with few unseen users, whose windows each rule follows one after the other."""
# These read files that are not in a package; tests of the scenarios and protocols use small local files.
DOWNLOADS = ("fedbn compare idx ", "fedbn compare cifar:", "fedbn compare --protocol ")
# Commands that keep running or take minutes; they have separate tests.
SKIPPED = (
    "fedbn demo",
    "fedbn leakage hapt",
    "fedbn leakage hapt --states",
    "fedbn serve hapt --rule rotation+population:diversity=1+matched/fallback",
)
MODEL = """
from torch import nn

def net(shape, classes):
    body = nn.Conv1d(shape[0], 8, 5), nn.BatchNorm1d(8), nn.AdaptiveAvgPool1d(1), nn.Flatten()
    return nn.Sequential(*body, nn.Linear(8, classes))
"""


@pytest.fixture
def run_line(tmp_path, monkeypatch):
    """A function that runs one command in a directory with the files that docs/own.md assumes."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    rng = np.random.default_rng(0)
    user, y = np.repeat(np.arange(4), 40), np.tile([0, 1], 80)
    x = (rng.normal(size=(160, 3, 128)) + y[:, None, None]).astype("float32")
    np.savez("mine.npz", x=x, y=y, user=user)
    flat = {f"acc{i}": column for i, column in enumerate(x.reshape(160, -1).T)}
    pd.DataFrame({**flat, "activity": y, "subject": user}).to_csv("walks.csv", index=False)
    pd.DataFrame({"a": x[:, 0, 0], "b": x[:, 1, 0], "label": y}).to_csv("table.csv", index=False)
    rows = np.arange(4 * 2_560)  # one sample per row: four users, activities in turn for 320 samples
    samples = pd.DataFrame(rng.normal(size=(len(rows), 3)), columns=["ax", "ay", "az"])
    samples.assign(activity=rows // 320 % 2, subject=rows // 2_560).to_csv("stream.csv", index=False)
    Path("mymodels.py").write_text(MODEL)
    monkeypatch.delitem(sys.modules, "mymodels", raising=False)

    def run(line):
        _, name, *arguments = shlex.split(line)
        is_listing = "--help" in arguments or not arguments  # `fedbn claims` only prints a list
        small = [] if is_listing else SMALL.get(name, [])
        fewer = FOLLOWED if name == "adapt" else FEWER
        monkeypatch.setattr(sys, "argv", ["fedbn", name, *(fewer.get(word, word) for word in arguments), *small])
        try:
            cli.main()
        except SystemExit as stop:
            return stop.code or 0
        return 0

    return run


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_page_commands_succeed(page, run_line, capsys):
    lines = [line for line in commands_in(page) if line not in SKIPPED and not line.startswith(DOWNLOADS)]
    assert lines
    for line in lines:
        code = run_line(line)
        assert code == 0, f"{line}: {capsys.readouterr().err}"

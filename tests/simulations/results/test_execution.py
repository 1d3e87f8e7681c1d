"""A comparison says once which engine ran, and why clients ran one by one."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from fedbn_simulations.report.terminal import show
from fedbn_simulations.results.comparison import Comparison
from fedbn_simulations.results.execution import summarize_execution
from tests.simulations.results.test_comparison import edit_runs, write

STACKED = {"train": ["stacked"], "evaluate": ["stacked"]}
REASON = "layer LSTM is not supported"
ONE_BY_ONE = {"train": [REASON], "evaluate": [REASON]}


def printed(comparison):
    console = Console(file=io.StringIO(), width=1000)
    show(comparison, console)
    return console.file.getvalue()


@pytest.mark.parametrize(
    ("execution", "text", "is_notice"),
    [
        (STACKED, "grid:stacked: clients trained and were scored side by side", False),
        (ONE_BY_ONE, f"grid:stacked: clients trained and were scored one by one ({REASON})", True),
        ({}, "grid:stacked", False),
    ],
)
def test_comparison_says_once_how_clients_ran(tmp_path, execution, text, is_notice):
    write(tmp_path, engine="grid:stacked", seeds=(0, 1))
    edit_runs(tmp_path, lambda result: result | {"execution": execution})
    comparison = Comparison.load(tmp_path)
    assert comparison.engine == text
    assert (f"engine {text}" in comparison.notices) is is_notice
    assert printed(comparison).count(text) == 1
    assert (f"Note: engine {text}" in printed(comparison)) is is_notice


def test_summary_groups_many_strategies():
    runs = [{"strategy": f"s{i}", "execution": STACKED if i < 30 else ONE_BY_ONE} for i in range(36) for _ in range(2)]
    assert summarize_execution("grid:stacked", runs) == (
        "grid:stacked: s0, s1, s2 and 27 more: clients trained and were scored side by side; "
        f"s30, s31, s32 and 3 more: clients trained and were scored one by one ({REASON})"
    )


def test_summary_unites_rounds_and_seeds():
    runs = [{"strategy": "fixbn", "execution": {"train": how}} for how in (["stacked"], ["stacked", "rule"], ["mode"])]
    text = "clients trained side by side or one by one (rule; mode)"
    assert summarize_execution("grid:auto", runs) == f"grid:auto: {text}"

"""Leakage of states of synthetic users, and the ``fedbn leakage`` command."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from fedbn.data.population import Examples, User
from fedbn.errors import UserError
from fedbn.federation.run import Run, plan_for
from fedbn.models.har_cnn import HarCNN
from fedbn_simulations.cli.app import app
from fedbn_simulations.leakage import states as leakage_states
from fedbn_simulations.leakage.messages import Leak
from fedbn_simulations.leakage.states import CONTROLS, StateLeak, measure_states, rows, state_leaks


def make_users(n=12, windows=60):
    """Users with individual offsets that both recordings share."""
    draw = torch.Generator().manual_seed(0)
    offset = 0.5 * torch.randn(n, 1, 6, 1, generator=draw)
    x = torch.randn(n, 2, windows, 6, 32, generator=draw) + offset[:, None]
    y = torch.zeros(windows, dtype=torch.long)
    parts = [[Examples(x[i, r], y, y) for r in range(2)] for i in range(n)]
    return [User(f"p{i}", "", *parts[i]) for i in range(n)]


@pytest.fixture(scope="module")
def leaks():
    torch.manual_seed(0)
    net = HarCNN((6, 32), 4).eval()
    return {leak.control: leak for leak in measure_states(net, make_users(), seed=0)}


@pytest.mark.slow
def test_users_and_windows_leak_without_control(leaks):
    assert list(leaks) == list(CONTROLS)
    for control in ("none", "clip=3"):
        assert leaks[control].first > 0.8
        assert leaks[control].chance == 1 / 12
    assert leaks["none"].error < 0.01
    assert leaks["none"].guess > 0.5


def test_each_control_reduces_its_leak(leaks):
    assert leaks["clip=3, noise=10"].first < 0.5
    assert leaks["clip=3, noise=1"].error > 3
    assert leaks["minimum=50"].error is None, "both states have the same released count"
    last_only = leaks["last layer alone"]
    assert last_only.first is None
    assert last_only.last == leaks["none"].last
    assert last_only.error is None


def test_states_below_minimum_are_not_released():
    leaks = measure_states(HarCNN((6, 32), 4).eval(), make_users(3, windows=20), seed=0)
    by_name = {leak.control: leak for leak in leaks}
    assert by_name["none"].users == 3
    withheld = by_name["minimum=50"]
    assert (withheld.users, withheld.first, withheld.error, withheld.chance) == (0, None, None, None)
    assert rows([withheld])[0]["chance"] == "not released"


def test_command_prints_states_table_and_updates_document(monkeypatch, tmp_path):
    leaks = [StateLeak("none", 0.5, None, None, 0.8, 4)]
    monkeypatch.setattr(leakage_states, "state_leaks", lambda run: leaks)
    page = tmp_path / "page.md"
    page.write_text("<!-- begin leakage-states -->\nold\n<!-- end leakage-states -->\n")
    result = CliRunner().invoke(app, ["leakage", "digits8", "--states", "--into", str(page)])
    assert result.exit_code == 0
    assert "50%" in result.output
    assert "| none | 4 | 50% | not released | 25% | not solvable | 0.8 |" in page.read_text()
    result = CliRunner().invoke(app, ["leakage", "digits8", "--states", "--json"])
    assert json.loads(result.output)[0]["users"] == 4


def test_command_updates_messages_table_in_document(monkeypatch, tmp_path):
    monkeypatch.setattr(
        "fedbn_simulations.leakage.messages.measure", lambda run, controls: [Leak("clip=1", "last", 0.5, 0.25, 4)]
    )
    monkeypatch.setattr("fedbn_simulations.leakage.messages.inversion", lambda run: {"guess": 0.8, "1": 1e-6})
    page = tmp_path / "page.md"
    page.write_text("<!-- begin leakage -->\nold\n<!-- end leakage -->\n")
    result = CliRunner().invoke(app, ["leakage", "digits8", "--into", str(page)])
    assert result.exit_code == 0
    assert "found again" in result.output
    assert "| clip=1 | last | 4 | 50% | 25% |" in page.read_text()
    assert "| none: guess the mean | 0.8 |\n| 1 | 1e-06 |" in page.read_text()


def test_leakage_rejects_bad_input():
    with pytest.raises(UserError, match="at least two people"):
        measure_states(HarCNN((6, 32), 4), make_users(1), seed=0)
    with pytest.raises(UserError, match="leakage of states works on running statistics"):
        measure_states(nn.Linear(2, 2), make_users(2), seed=0)
    with pytest.raises(UserError, match="shares no model"):
        state_leaks(Run("digits8", "local", plan=plan_for("digits8")))
    with pytest.raises(UserError, match="goes with --states"):
        CliRunner().invoke(app, ["leakage", "digits8", "--rounds", "3"], catch_exceptions=False)

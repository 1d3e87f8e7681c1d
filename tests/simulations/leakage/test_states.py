"""What the states of made-up people give away, and the command that measures it on real ones."""

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
from simulations.cli.app import app
from simulations.leakage import states as leakage_states
from simulations.leakage.messages import Leak
from simulations.leakage.states import CONTROLS, StateLeak, measure_states, rows, state_leaks


def people(n=12, windows=60):
    """With an offset of their own that both recordings share."""
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
    return {leak.control: leak for leak in measure_states(net, people(), seed=0)}


def test_without_a_control_people_and_windows_are_found(leaks):
    assert list(leaks) == list(CONTROLS)
    for control in ("none", "clip=3"):
        assert leaks[control].first > 0.8
        assert leaks[control].chance == 1 / 12
    assert leaks["none"].error < 0.01
    assert leaks["none"].guess > 0.5


def test_each_control_does_its_own(leaks):
    assert leaks["clip=3, noise=10"].first < 0.5
    assert leaks["clip=3, noise=1"].error > 3
    assert leaks["minimum=50"].error is None, "the count told does not move between the two"
    late = leaks["last layer alone"]
    assert late.first is None
    assert late.last == leaks["none"].last
    assert late.error is None


def test_people_with_too_few_windows_are_not_released():
    few = measure_states(HarCNN((6, 32), 4).eval(), people(3, windows=20), seed=0)
    by_name = {leak.control: leak for leak in few}
    assert by_name["none"].users == 3
    kept_back = by_name["minimum=50"]
    assert (kept_back.users, kept_back.first, kept_back.error, kept_back.chance) == (0, None, None, None)
    assert rows([kept_back])[0]["chance"] == "not released"


def test_the_command_prints_the_table_and_puts_it_into_a_document(monkeypatch, tmp_path):
    said = [StateLeak("none", 0.5, None, None, 0.8, 4)]
    monkeypatch.setattr(leakage_states, "state_leaks", lambda run: said)
    page = tmp_path / "page.md"
    page.write_text("<!-- begin leakage-states -->\nold\n<!-- end leakage-states -->\n")
    done = CliRunner().invoke(app, ["leakage", "digits8", "--states", "--into", str(page)])
    assert done.exit_code == 0
    assert "50%" in done.output
    assert "| none | 4 | 50% | not released | 25% | nothing to solve | 0.8 |" in page.read_text()
    done = CliRunner().invoke(app, ["leakage", "digits8", "--states", "--json"])
    assert json.loads(done.output)[0]["users"] == 4


def test_what_messages_give_away_goes_into_a_document_too(monkeypatch, tmp_path):
    monkeypatch.setattr(
        "simulations.leakage.messages.measure", lambda run, controls: [Leak("clip=1", "last", 0.5, 0.25, 4)]
    )
    monkeypatch.setattr("simulations.leakage.messages.inversion", lambda run: {"guess": 0.8, "1": 1e-6})
    page = tmp_path / "page.md"
    page.write_text("<!-- begin leakage -->\nold\n<!-- end leakage -->\n")
    done = CliRunner().invoke(app, ["leakage", "digits8", "--into", str(page)])
    assert done.exit_code == 0
    assert "found again" in done.output
    assert "| clip=1 | last | 4 | 50% | 25% |" in page.read_text()
    assert "| none: guess the mean | 0.8 |\n| 1 | 1e-06 |" in page.read_text()


def test_what_cannot_be_measured_is_said():
    with pytest.raises(UserError, match="two people at least"):
        measure_states(HarCNN((6, 32), 4), people(1), seed=0)
    with pytest.raises(UserError, match="leakage of states works on running statistics"):
        measure_states(nn.Linear(2, 2), people(2), seed=0)
    with pytest.raises(UserError, match="shares no model"):
        state_leaks(Run("digits8", "local", plan=plan_for("digits8")))
    with pytest.raises(UserError, match="goes with --states"):
        CliRunner().invoke(app, ["leakage", "digits8", "--rounds", "3"], catch_exceptions=False)

"""What travels besides entries is counted alike by every engine, and as much as is really in the messages."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from flwr.clientapp import ClientApp

import clients.app as client
from fedbn.federation.run import plan_for
from fedbn.federation.setup import build_context
from fedbn.federation.traffic import MESSAGE, REPEATED, Traffic
from fedbn.nn.roles import statistics_layers
from fedbn.strategies.base import Update
from simulations.engines.execute import execute
from simulations.engines.grid import InProcessGrid
from simulations.experiments.compare import compare
from simulations.experiments.experiment import Experiment
from simulations.flower.compat import task_identity
from simulations.report.documents import update_document
from simulations.results import inference
from simulations.results.comparison import Comparison
from simulations.results.formatting import format_size
from simulations.server.rounds import run_rounds
from simulations.storage.checkpoint import load_outcome, save_outcome

TALKATIVE = {"fedtan": 1, "hbn": 1, "static-bn": 1, "global-recalibrated": 1, "fedap": 1, "global-naive+scaffold": 2}
"""Rounds by treatment: SCAFFOLD's server has something to tell from the second on."""


def in_messages(run):
    """Bytes of tensors in the messages of a run, by direction, kind of message and record."""
    found = Counter()

    def spy(message, context, call_next):
        reply = call_next(message, context)
        kind = message.metadata.message_type
        for way, content in (("down", message.content), ("up", reply.content)):
            for name, record in content.array_records.items():
                found[way, kind, name] += sum(
                    math.prod(a.shape) * getattr(torch, a.dtype).itemsize for a in record.values()
                )
        return reply

    config, app = {"run": run.to_json()}, ClientApp(mods=[spy])
    app.train()(client.train)
    app.evaluate()(client.evaluate)
    for kind in ("sync_first_batch", "sync_statistics", "partition"):
        app.query(kind)(getattr(client, kind))
    with task_identity(1):
        outcome = run_rounds(InProcessGrid(app, len(build_context(run).population.users), config), run)
    return found, outcome.traffic


@pytest.mark.parametrize("strategy", TALKATIVE)
def test_every_byte_besides_entries_is_counted_once(strategy, small):
    run = small(strategy, rounds=TALKATIVE[strategy], clients_per_round=2)
    found, traffic = in_messages(run)
    for way, counted in (("down", traffic.down), ("up", traffic.up)):
        sent = sum(n for (w, kind, _), n in found.items() if w == way and kind != "evaluate")
        assert sum(counted.values()) == sent - found[way, "train", "arrays"]
    assert sum(traffic.up.values()) > 0
    assert traffic == execute(run, "reference").traffic


def test_what_a_strategy_without_conversations_sends_are_its_entries_alone(small):
    run = small("global-naive")
    found, traffic = in_messages(run)
    assert traffic.rows() == []
    ctx = build_context(run)
    entries = sum(row["bytes_up"] for row in ctx.ownership.rows())
    assert found["up", "train", "arrays"] == traffic.trained * entries == 2 * len(ctx.trainers) * entries


def test_fedtan_says_three_things_a_layer(small):
    """A mean, a mean square, and the two statistic gradients together; each is a count and two vectors of doubles."""
    run = small("fedtan")
    ctx = build_context(run)
    channels = [layer.num_features for layer in statistics_layers(ctx.scratch).values()]
    rows = {row["role"]: row for row in execute(run).traffic.rows()}
    assert (
        rows["first-batch sync"]["bytes_up"]
        == rows["first-batch sync"]["bytes_down"]
        == sum(4 * (8 + 16 * c) for c in channels)
    )
    model = sum(row["bytes_down"] for row in ctx.ownership.rows())
    said = [8 + 16 * c for c in channels for _ in range(2)] + [2 * (8 + 16 * c) for c in reversed(channels)]
    asked = [sum(said[: max(i - 1, 0)]) for i in range(len(said) + 1)]  # earlier answers, again with each question
    assert len(asked) == 3 * len(channels) + 1
    assert rows[REPEATED]["bytes_down"] == sum(model + earlier for earlier in asked) + sum(said)


def test_moments_settled_once_are_said_once_by_every_trainer(small):
    run = small("global-recalibrated", eval_every=2, clients_per_round=3)
    ctx = build_context(run)
    channels = [layer.num_features for layer in statistics_layers(ctx.scratch).values()]
    traffic = execute(run).traffic
    assert traffic.trained == 2 * 3
    assert traffic.up["statistics sync"] == len(ctx.trainers) * sum(8 + 16 * c for c in channels)


def test_counts_survive_a_checkpoint(small, tmp_path):
    run = small("static-bn", clients_per_round=2)
    execute(run, on_round=lambda number, out: number == 1 and save_outcome(tmp_path / "half", run, out))
    halves = load_outcome(tmp_path / "half", run)
    assert halves.traffic.trained == 2
    assert execute(run, "grid:stacked", resume=halves).traffic == execute(run).traffic


def test_rows_say_that_they_are_messages_and_leave_out_what_never_happened():
    traffic = Traffic()
    assert traffic.rows() == []
    traffic.round([Update(0, {}, 1, 0.0, {"n": torch.zeros(3)})], {"c": torch.zeros(2)}, [])
    (row,) = traffic.rows()
    assert (row["role"], row["owner"], row["bytes_down"], row["bytes_up"]) == ("notes", MESSAGE, 8, 12)


def test_a_page_says_what_clients_without_a_memory_are_told_again(tmp_path, monkeypatch):
    monkeypatch.setattr(inference, "RESAMPLES", 50)
    plan = plan_for("digits8", rounds=1, global_test=60, clients_per_round=2)
    what = Experiment("digits8:images=600", ("global-naive", "fedtan"), plan=plan, seeds=1)
    page = tmp_path / "page.md"
    page.write_text("<!-- begin out -->\n<!-- end out -->\n")
    update_document(compare(what, tmp_path / "out", workers=1), page, full=True)
    costs = page.read_text().split("bytes per client and round; repeated is the part of down")[1].splitlines()
    cells = {cells[0]: cells[1:] for line in costs if (cells := [c.strip() for c in line.split("|")[1:-1]])}
    assert cells["strategy"] == ["time", "down", "up", "repeated"]
    assert cells["global-naive"][3] == "0 B"
    traffic = Comparison.load(tmp_path / "out").traffic().set_index(["strategy", "role"])["bytes_down"]
    assert cells["fedtan"][3] == format_size(traffic["fedtan", REPEATED]) != "0 B"
    assert cells["fedtan"][1] == format_size(traffic["fedtan"].sum())

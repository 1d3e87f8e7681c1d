"""Traffic besides the model's entries equals the bytes in messages and is counted equally by every engine."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from flwr.clientapp import ClientApp

import fedbn_clients.app as client
from fedbn.federation.run import plan_for
from fedbn.federation.setup import build_context
from fedbn.federation.traffic import MESSAGE, REPEATED, Traffic
from fedbn.nn.roles import statistics_layers
from fedbn.strategies.base import Update
from fedbn_simulations.engines.execute import execute
from fedbn_simulations.engines.grid import InProcessGrid
from fedbn_simulations.experiments.compare import compare
from fedbn_simulations.experiments.experiment import Experiment
from fedbn_simulations.flower.compat import task_identity
from fedbn_simulations.report.documents import update_document
from fedbn_simulations.results import inference
from fedbn_simulations.results.comparison import Comparison
from fedbn_simulations.results.formatting import format_size
from fedbn_simulations.server.rounds import run_rounds
from fedbn_simulations.storage.checkpoint import load_outcome, save_outcome

pytestmark = pytest.mark.slow

ROUNDS = {"fedtan": 1, "hbn": 1, "static-bn": 1, "global-recalibrated": 1, "fedap": 1, "global-naive+scaffold": 2}
"""Rounds by treatment; SCAFFOLD broadcasts from the second round on."""


def message_bytes(run):
    """Bytes of tensors in the messages of a run, by direction, kind of message and record."""
    sizes = Counter()

    def count(message, context, call_next):
        reply = call_next(message, context)
        kind = message.metadata.message_type
        for direction, content in (("down", message.content), ("up", reply.content)):
            for name, record in content.array_records.items():
                size = sum(math.prod(a.shape) * getattr(torch, a.dtype).itemsize for a in record.values())
                sizes[direction, kind, name] += size
        return reply

    config, app = {"run": run.to_json()}, ClientApp(mods=[count])
    app.train()(client.train)
    app.evaluate()(client.evaluate)
    for kind in ("sync_first_batch", "sync_statistics", "partition"):
        app.query(kind)(getattr(client, kind))
    with task_identity(1):
        outcome = run_rounds(InProcessGrid(app, len(build_context(run).population.users), config), run)
    return sizes, outcome.traffic


@pytest.mark.parametrize("strategy", ROUNDS)
def test_traffic_equals_message_bytes_besides_entries(strategy, small):
    run = small(strategy, rounds=ROUNDS[strategy], clients_per_round=2)
    sizes, traffic = message_bytes(run)
    for direction, counted in (("down", traffic.down), ("up", traffic.up)):
        sent = sum(n for (d, kind, _), n in sizes.items() if d == direction and kind != "evaluate")
        assert sum(counted.values()) == sent - sizes[direction, "train", "arrays"]
    assert sum(traffic.up.values()) > 0
    assert traffic == execute(run, "reference").traffic


def test_traffic_is_empty_without_synchronization(small):
    run = small("global-naive")
    sizes, traffic = message_bytes(run)
    assert traffic.rows() == []
    ctx = build_context(run)
    entries = sum(row["bytes_up"] for row in ctx.ownership.rows())
    assert sizes["up", "train", "arrays"] == traffic.trained * entries == 2 * len(ctx.trainers) * entries


def test_fedtan_sends_three_messages_per_layer(small):
    """A mean, a mean square, and the two statistic gradients together; each is a count and two vectors of doubles."""
    run = small("fedtan")
    ctx = build_context(run)
    channels = [layer.num_features for layer in statistics_layers(ctx.scratch).values()]
    rows = {row["role"]: row for row in execute(run).traffic.rows()}
    sync = rows["first-batch sync"]
    assert sync["bytes_up"] == sync["bytes_down"] == sum(4 * (8 + 16 * c) for c in channels)
    model = sum(row["bytes_down"] for row in ctx.ownership.rows())
    messages = [8 + 16 * c for c in channels for _ in range(2)] + [2 * (8 + 16 * c) for c in reversed(channels)]
    repeated = [sum(messages[: max(i - 1, 0)]) for i in range(len(messages) + 1)]  # earlier aggregates per request
    assert len(repeated) == 3 * len(channels) + 1
    assert rows[REPEATED]["bytes_down"] == sum(model + earlier for earlier in repeated) + sum(messages)


def test_recalibration_sends_moments_once_per_client(small):
    run = small("global-recalibrated", eval_every=2, clients_per_round=3)
    ctx = build_context(run)
    channels = [layer.num_features for layer in statistics_layers(ctx.scratch).values()]
    traffic = execute(run).traffic
    assert traffic.trained == 2 * 3
    assert traffic.up["statistics sync"] == len(ctx.trainers) * sum(8 + 16 * c for c in channels)


def test_traffic_survives_checkpoint(small, tmp_path):
    run = small("static-bn", clients_per_round=2)
    execute(run, on_round=lambda number, out: number == 1 and save_outcome(tmp_path / "half", run, out))
    half = load_outcome(tmp_path / "half", run)
    assert half.traffic.trained == 2
    assert execute(run, "grid:stacked", resume=half).traffic == execute(run).traffic


def test_traffic_rows_are_messages_with_bytes():
    traffic = Traffic()
    assert traffic.rows() == []
    traffic.count_round([Update(0, {}, 1, 0.0, {"n": torch.zeros(3)})], {"c": torch.zeros(2)}, [])
    (row,) = traffic.rows()
    assert (row["role"], row["owner"], row["bytes_down"], row["bytes_up"]) == ("notes", MESSAGE, 8, 12)


def test_report_page_shows_repeated_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(inference, "RESAMPLES", 50)
    plan = plan_for("digits8", rounds=1, global_test=60, clients_per_round=2)
    experiment = Experiment("digits8:images=600", ("global-naive", "fedtan"), plan=plan, seeds=1)
    page = tmp_path / "page.md"
    page.write_text("<!-- begin out -->\n<!-- end out -->\n")
    update_document(compare(experiment, tmp_path / "out", workers=1), page, full=True)
    costs = page.read_text().split("bytes per client and round; repeated is the part of down")[1].splitlines()
    cells = {cells[0]: cells[1:] for line in costs if (cells := [c.strip() for c in line.split("|")[1:-1]])}
    assert cells["strategy"] == ["time", "CPU s", "down", "up", "repeated"]
    assert cells["global-naive"][4] == "0 B"
    traffic = Comparison.load(tmp_path / "out").traffic().set_index(["strategy", "role"])["bytes_down"]
    assert cells["fedtan"][4] == format_size(traffic["fedtan", REPEATED]) != "0 B"
    assert cells["fedtan"][2] == format_size(traffic["fedtan"].sum())

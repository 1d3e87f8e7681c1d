"""The benchmarks measure what they claim, and the plain PyTorch loop is FedBN."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import __main__ as command
from benchmarks import measure, peers, workloads
from benchmarks.faults import COMMANDS, command_kills
from benchmarks.loop import Loop
from benchmarks.measure import grid_rounds, ratios, scale
from benchmarks.soak import growth
from benchmarks.workloads import WORKLOADS, plain_loop
from fedbn.errors import UserError
from fedbn.federation.loop import federate
from fedbn.federation.setup import build_context
from fedbn.federation.training import epoch_batches


def tiny():
    return replace(WORKLOADS[2], clients=3, steps=2)


def test_workloads_match_table(tmp_path):
    for work in WORKLOADS:
        ctx = build_context(replace(work, clients=2).run(tmp_path, 1))
        sizes = {len(u.train) for u in ctx.population.users}
        assert sizes == {work.steps * work.batch}
        assert {len(u.test) for u in ctx.population.users} == {work.tests}
        assert f"{sum(p.numel() for p in ctx.scratch.parameters()):,}" in str(workloads.__doc__)


def test_plain_loop_matches_federated_round(tmp_path, monkeypatch):
    """With the same shuffles, the plain loop and the federation end in the same state."""
    run = tiny().run(tmp_path, 1)
    ctx = build_context(run)
    drawn = iter(ctx.trainers)
    monkeypatch.setattr(
        "benchmarks.workloads.batches", lambda n, size, draw: epoch_batches(n, run.plan, 0, 1, next(drawn), 0)
    )
    loop = plain_loop(ctx)
    next(loop)
    shared = loop.gi_frame.f_locals["shared"]
    expected = federate(run).server.state
    assert shared.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(shared[key], value, rtol=1e-5, atol=1e-6)


def test_grid_rounds_keeps_number_of_threads(tmp_path):
    run = tiny().run(tmp_path, 4)
    before = torch.get_num_threads()
    between = []
    timing = grid_rounds(run, "stacked", lambda: between.append(1))
    assert len(timing.wall) == len(timing.cpu) == 2
    assert len(between) == 4
    assert min(timing.wall) > 0
    assert torch.get_num_threads() == before


def test_peers_serve_requires_pfl(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pfl", None)
    with pytest.raises(UserError, match="make bench-peers"):
        peers.serve(build_context(tiny().run(tmp_path, 1)))


def test_peer_learner_uses_mean_loss(tmp_path):
    ctx = build_context(tiny().run(tmp_path, 1))
    part = ctx.training_data(0)
    model = ctx.load(ctx.initial)
    expected = torch.nn.functional.cross_entropy(model.train()(part.x), part.y)
    assert torch.equal(peers.Learner(ctx.load(ctx.initial).eval()).loss(part.x, part.y), expected)


@pytest.mark.slow
def test_loop_process_runs_rounds_and_reports_exit(tmp_path):
    with Loop(tiny().run(tmp_path, 4)) as loop:
        loop.round()
        assert len(loop.wall) == len(loop.cpu) == 1
        assert loop.wall[0] > 0
        loop._process.kill()
        loop._process.wait()
        with pytest.raises(RuntimeError, match="benchmarks.loop exited"):
            loop.round()
    (row,) = ratios(tmp_path, ["one"], 3, [tiny()])
    assert row["engine"] == "grid:one"
    assert row["ratio"] == row["seconds"] / row["loop"]


@pytest.mark.slow
def test_scale_keeps_work_constant(tmp_path):
    rows = list(scale(tmp_path, "stacked", 3, 100))
    assert [(row["clients"], row["steps"]) for row in rows] == [(10, 10), (100, 1)]
    assert rows[0]["data"] > 0


def test_benchmark_command_writes_prints_and_warns(tmp_path, monkeypatch, capsys):
    row = {"workload": "W3", "engine": "grid:auto", "loop": 0.1, "seconds": 0.01, "ratio": 0.1, "target": 0.05}
    row |= {"ratio of medians": 0.2, "ratio of CPU time": 0.3}
    peer = row | {"engine": "pfl", "ratio of CPU time": None, "target": None}
    result = {
        "ratios": [row, peer],
        "scale": [{"clients": 10, "steps": 1, "seconds": 0.1, "loop": 0.4, "data": 10**6, "memory": 2 * 10**6}],
        "evaluation": {"W3": 0.1},
        "bank": {"predict, ratio to stock": 1.2},
        "starts": {"import": 1.0},
    }
    monkeypatch.setattr("benchmarks.measure.measure", lambda *args, **options: result)
    monkeypatch.setattr(command, "STORED", tmp_path / "stored.json")
    page = tmp_path / "page.md"
    page.write_text("![it](speed.png)\n<!-- begin speed -->\n<!-- end speed -->\n")
    assert command.main(["--out", str(tmp_path), "--store", "--into", str(page)]) == 0
    assert "| W3 | grid:auto |" in page.read_text()
    assert "bank" not in page.read_text()
    assert (tmp_path / "speed.png").read_bytes() == (tmp_path / "benchmarks.png").read_bytes()
    assert json.loads((tmp_path / "stored.json").read_text()) == json.loads((tmp_path / "benchmarks.json").read_text())
    assert (tmp_path / "benchmarks.png").stat().st_size > 1000
    out, err = capsys.readouterr()
    assert "| W3 | grid:auto | 100.0 | 10.0 | 0.100 | 0.200 | 0.300 | 0.05 |" in out
    assert "| W3 | pfl | 100.0 | 10.0 | 0.100 | 0.200 |  |  |" in out
    assert "| 10 | 1 | 400.0 | 100.0 | 0.250 | 10000 | 1 | 2 |" in out
    assert "| bank, predict, ratio to stock | 1.20 |" in out
    assert not err
    result["ratios"] = [row | {"ratio": 0.2}]
    command.main(["--out", str(tmp_path)])
    assert "warning: W3 on grid:auto takes 0.200 times the plain loop; stored: 0.100" in capsys.readouterr().err


def test_measure_bank_reports_ratios():
    result = measure.bank(users=40, rows=16, repeats=2)
    assert {"predict, ratio to stock", "predict and commit, ratio to stock", "state, bytes per user"} == result.keys()
    assert all(value > 0 for value in result.values())


@pytest.mark.slow
def test_soak_memory_does_not_grow(tmp_path):
    out = tmp_path / "soak.jsonl"
    command = [sys.executable, "-m", "benchmarks.soak", "--clients", "400", "--rounds", "120", "--share", "0.05"]
    subprocess.run([*command, "--out", str(out)], check=True, cwd=Path(__file__).parents[2], capture_output=True)
    *readings, result = map(json.loads, out.read_text().splitlines())
    assert [r["round"] for r in readings] == list(range(1, 121))
    assert result["growth per round"] < 20_000  # a client state has a thousand bytes, and a round uses twenty clients
    assert 300 < result["states"] <= 400


def test_growth_is_slope_of_second_half():
    assert growth([9, 9, 9, 9, 1, 3, 5, 7]) == pytest.approx(2)
    assert growth([1, 2, 3]) is None


@pytest.mark.slow
@pytest.mark.parametrize("wrong", [False, True])
def test_command_kills_compares_results_bit_by_bit(tmp_path, wrong):
    """A command that is killed has the results of an undisturbed one; other results are counted."""
    _, results = COMMANDS["compare"]
    arguments = "digits8:users=3:unseen=1 --strategies fedbn --rounds 2 --seeds 1"

    def read(folder):
        found = results(folder)
        assert len(found) == 1
        return {run: [folder.name if wrong else None, *values] for run, values in found.items()}

    row = command_kills("compare", arguments, read, 1, tmp_path, log=print)
    assert row["tries"] == 1
    assert (row["lost or wrong"] > 0) is wrong

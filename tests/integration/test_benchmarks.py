"""The benchmarks measure what they claim, and the plain PyTorch loop is FedBN."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from benchmarks import __main__ as command
from benchmarks import grid, measure, workloads
from benchmarks.faults import COMMANDS, command_kills
from benchmarks.measure import OURS, System, compare, scale
from benchmarks.peers import pfl_research, pfllib
from benchmarks.rounds import ProcessEnded
from benchmarks.soak import growth
from benchmarks.workloads import WORKLOADS, plain_loop
from fedbn.errors import UserError
from fedbn.federation.loop import federate
from fedbn.federation.setup import build_context
from fedbn.federation.training import epoch_batches, shuffle
from fedbn.models.image_cnn import ImageCNN
from tests.helpers import ROOT


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


class Clock:
    """A meter that stops after three rounds."""

    def __init__(self):
        self.calls = []

    def wait(self, name="wait"):
        self.calls.append(name)
        if len(self.calls) > 6:
            sys.exit()

    def reply(self):
        self.wait("reply")


def test_grid_waits_before_each_round_and_keeps_number_of_threads(tmp_path):
    before, clock = torch.get_num_threads(), Clock()
    with pytest.raises(SystemExit):
        grid.rounds(build_context(tiny().run(tmp_path)), "stacked", clock)
    assert clock.calls == [*["wait", "reply"] * 3, "wait"]
    assert torch.get_num_threads() == before


def test_peers_serve_requires_pfl(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pfl", None)
    with pytest.raises(UserError, match="make bench-peers"):
        pfl_research.serve(build_context(tiny().run(tmp_path, 1)))


def test_peer_learner_uses_mean_loss(tmp_path):
    ctx = build_context(tiny().run(tmp_path, 1))
    part = ctx.training_data(0)
    model = ctx.load(ctx.initial)
    expected = torch.nn.functional.cross_entropy(model.train()(part.x), part.y)
    assert torch.equal(pfl_research.Learner(ctx.load(ctx.initial).eval()).loss(part.x, part.y), expected)


def test_peers_jax_requires_jax(monkeypatch):
    monkeypatch.setitem(sys.modules, "jax", None)
    monkeypatch.delitem(sys.modules, "benchmarks.peers.jax_vmap", raising=False)
    with pytest.raises(UserError, match="make bench-peers"):
        importlib.import_module("benchmarks.peers.jax_vmap")


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("jax") is None, reason="needs jax (make bench-peers)")
@pytest.mark.parametrize("number", range(4))
def test_peers_jax_matches_federation(tmp_path, number):
    """With the same batches, two rounds of the JAX program and of the federation end in the same states."""
    from benchmarks.peers.jax_vmap import rounds

    run = replace(WORKLOADS[number], clients=3, steps=2).run(tmp_path, 2)
    ctx = build_context(run)
    drawn = iter([(round, user) for round in (1, 2) for user in ctx.trainers])

    def order(n):
        round, user = next(drawn)
        return torch.randperm(n, generator=shuffle(run.seed, round, user, 0)).numpy()

    *_, states = (state for _, state in zip(range(2), rounds(ctx, order), strict=False))
    expected = federate(run).client_states
    assert len(expected) == 3
    for user, state in expected.items():
        for name, value in state.items():
            error = torch.from_numpy(np.array(states[name][user])) - value
            change = (value - ctx.initial[name]).double().norm()
            # Rounding makes a few activations cross the kink of ReLU, so not every element is equal.
            assert error.double().norm() <= 0.01 * change + 1e-5, name


def test_with_bn_names_renames_normalization_only():
    torch.manual_seed(0)
    named, plain = pfllib.with_bn_names(ImageCNN((1, 28, 28), 10)), ImageCNN((1, 28, 28), 10)
    plain.load_state_dict(dict(zip(plain.state_dict(), named.state_dict().values(), strict=True)))
    x = torch.randn(3, 1, 28, 28)
    assert torch.equal(named(x), plain(x))
    norms = {n for n, m in named.named_modules() if isinstance(m, torch.nn.BatchNorm2d)}
    assert norms == {n for n, _ in named.named_modules() if "bn" in n}
    assert len(norms) == 3


PFLLIB = """
from pathlib import Path
import numpy as np

class {name}:
    def __init__(self, args, times):
        self.args = args

    def train(self):
        for number in range(self.args.global_rounds + 1):
            self.evaluate()
            self.args.read = np.load(Path("../dataset/peer/train/2.npz"), allow_pickle=True)["data"].tolist()
        self.save_results()
"""


def test_pfllib_server_has_clients_data_and_calls_back(tmp_path, monkeypatch):
    ctx = build_context(tiny().run(tmp_path, 2))
    arguments = [ctx.population.users[i] for i in ctx.trainers], ctx.scratch, 10, ctx.run.plan
    called = []
    with pytest.raises(UserError, match="clone of PFLlib"):
        pfllib.server(tmp_path, "FedBN", *arguments, called.append).__enter__()
    place = tmp_path / "clone" / "system" / "flcore" / "servers"
    place.mkdir(parents=True)
    for name in ("FedAvg", "FedBN"):
        (place / f"server{name[3:].lower()}.py").write_text(PFLLIB.format(name=name))
    monkeypatch.setattr(sys, "path", sys.path[:])
    with pfllib.server(tmp_path / "clone", "FedBN", *arguments, called.append) as peer:
        peer.train()
    assert called == [peer] * 3
    assert (peer.args.batch_size, peer.args.local_learning_rate, peer.args.num_clients) == (16, 0.01, 3)
    assert torch.equal(torch.tensor(peer.args.read["x"]), ctx.training_data(2).x)


class FakeProcess:
    """Rounds without a process: the loop takes 2 s and all others 1 s."""

    def __init__(self, module, run, threads, options=(), python=""):
        self.module, self.options = module, options
        self.wall, self.cpu, self.memory = [], [], 5 * 10**6
        self.slow = 2.0 if module == "benchmarks.loop" else 1.0

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def round(self):
        if self.module == "broken" and self.wall:
            raise ProcessEnded("no such layer")
        first = 10 if not self.wall else 0
        self.wall.append(self.slow + first)
        self.cpu.append(self.slow / 2 + first)


def test_compare_alternates_rounds_and_gives_reasons(tmp_path, monkeypatch):
    monkeypatch.setattr(measure, "RoundProcess", FakeProcess)
    systems = [*OURS, System("other", "broken")]
    rows = {row["system"]: row for row in compare(WORKLOADS[2], systems, tmp_path, 1, 3, 0)}
    assert list(rows) == ["grid:auto", "grid:auto, bfloat16", "grid:exact", "other"]
    auto = rows["grid:auto"]
    assert (auto["ratio"], auto["ratio of medians"], auto["ratio of CPU time"], auto["rounds"]) == (0.5, 0.5, 0.5, 3)
    assert (auto["target"], rows["grid:exact"]["target"]) == (0.06, None)
    assert rows["other"]["reason"] == "no such layer"


def test_scale_keeps_work_constant(tmp_path, monkeypatch):
    monkeypatch.setattr(measure, "RoundProcess", FakeProcess)
    rows = list(scale(tmp_path, 1, 1, 100))
    assert [(row["clients"], row["steps"]) for row in rows] == [(10, 10), (100, 1)]
    run = replace(tiny(), clients=100, steps=1).run(tmp_path, 1)
    assert rows[1]["data"] == sum(u.train.x.nbytes + u.test.x.nbytes for u in build_context(run).population.users)


@pytest.mark.slow
def test_round_processes_alternate_and_name_their_error(tmp_path):
    systems = [System("grid:one", "benchmarks.grid", ("one",)), System("pfl", "benchmarks.peers.pfl_research")]
    rows = list(compare(tiny(), systems, tmp_path, 1, 2, 0))
    assert rows[0]["ratio"] == rows[0]["seconds"] / rows[0]["loop"] > 0
    assert rows[0]["memory"] > 0
    if not importlib.util.find_spec("pfl"):
        assert rows[1]["reason"].startswith("pfl needs its own environment: run make bench-peers")


@pytest.mark.slow
def test_meter_answers_and_prints_go_to_standard_error():
    code = "from benchmarks.rounds import serve; print('early', flush=True); serve(lambda: print('noise', flush=True))"
    child = subprocess.run([sys.executable, "-c", code], input="\n\n", capture_output=True, text=True, cwd=ROOT)
    early, *answers = child.stdout.splitlines()
    assert early == "early"
    assert [len(json.loads(answer)) for answer in answers] == [3, 3]
    assert child.stderr.splitlines() == ["noise"] * 2
    assert child.returncode == 0


def test_benchmark_command_writes_prints_and_warns(tmp_path, monkeypatch, capsys):
    row = {"workload": "W3", "system": "grid:auto", "threads": 2, "loop": 0.1, "seconds": 0.01, "cpu": 0.02}
    row |= {"ratio": 0.1, "ratio of medians": 0.2, "ratio of CPU time": 0.3, "target": 0.05}
    peer = {"workload": "W3", "system": "JAX", "threads": 2, "loop": 0.1, "reason": "no such layer"}
    ray = row | {"workload": "W1", "system": "Flower on Ray", "ratio": 2.0, "target": None}
    result = {
        "ratios": [row, ray, peer],
        "quick": [row | {"threads": 1, "ratio of CPU time": 0.4}],
        "scale": [row | {"clients": 10, "steps": 1, "seconds": 0.1, "loop": 0.4, "data": 10**6, "memory": 2 * 10**6}],
        "evaluation": {"W3": 0.1},
        "bank": {"predict, ratio to stock": 1.2},
        "starts": {"import": 1.0},
    }
    monkeypatch.setattr("benchmarks.measure.measure", lambda *args, **options: result)
    monkeypatch.setattr(command, "STORED", tmp_path / "stored.json")
    (tmp_path / "stored.json").write_text("{}")
    page = tmp_path / "page.md"
    page.write_text("![it](speed.png)\n<!-- begin speed -->\n<!-- end speed -->\n")
    assert command.main(["--out", str(tmp_path / "out"), "--store", "--into", str(page)]) == 0
    assert "| 2 | W3 | grid:auto |" in page.read_text()
    assert "bank" not in page.read_text()
    assert (tmp_path / "speed.png").read_bytes() == (tmp_path / "out" / "speed.png").read_bytes()
    stored = (tmp_path / "stored.json").read_text()
    assert json.loads(stored) == json.loads((tmp_path / "out" / "benchmarks.json").read_text()) == result
    assert (tmp_path / "speed.png").stat().st_size > 1000
    out, err = capsys.readouterr()
    assert "| 2 | W3 | grid:auto | 100.0 | 10.0 | 0.100 | 0.200 | 0.300 | 0.05 |" in out
    assert "| 2 | W1 | Flower on Ray | 100.0 | 10.0 | 2.000 | 0.200 | 0.300 |  |" in out
    assert "| 2 | W3 | JAX | 100.0 | not measured: no such layer |  |  |  |  |" in out
    assert "| 10 | 1 | 400.0 | 100.0 | 0.100 | 0.300 | 2000 | 1 | 2 |" in out
    assert "| bank, predict, ratio to stock | 1.20 |" in out
    assert not err
    monkeypatch.setattr(
        "benchmarks.measure.measure_quick", lambda log: {"quick": [result["quick"][0] | {"ratio of CPU time": 0.7}]}
    )
    monkeypatch.delenv("GITHUB_ACTIONS", raising=False)
    assert command.main(["--quick"]) == 0
    warning = "warning: W3 on grid:auto takes 0.700 times the CPU time of the plain loop (threads: 1); stored: 0.400"
    assert warning in capsys.readouterr().err
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    command.main(["--quick"])
    assert capsys.readouterr().err.startswith("::warning::W3")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--threads", "1,900"], "choose from 1 to"),
        (["--threads", "two"], "choose from 1 to"),
        (["--peers", "no-such-python"], "there is no such interpreter"),
        (["--pfllib", "."], "is not a clone of PFLlib"),
    ],
)
def test_benchmark_command_refuses_wrong_options(arguments, message, capsys):
    with pytest.raises(SystemExit):
        command.main(arguments)
    assert message in capsys.readouterr().err


def test_measure_bank_reports_ratios():
    result = measure.bank(users=40, rows=16, repeats=2)
    assert {"predict, ratio to stock", "predict and commit, ratio to stock", "state, bytes per user"} == result.keys()
    assert all(value > 0 for value in result.values())


@pytest.mark.slow
def test_soak_memory_does_not_grow(tmp_path):
    out = tmp_path / "soak.jsonl"
    command = [sys.executable, "-m", "benchmarks.soak", "--clients", "400", "--rounds", "120", "--share", "0.05"]
    subprocess.run([*command, "--out", str(out)], check=True, cwd=ROOT, capture_output=True)
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

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace

import pytest

from fedbn.errors import UserError
from fedbn.federation.loop import federate
from fedbn.federation.run import plan_for
from fedbn.federation.setup import build_context
from fedbn.files import read_json, write_json
from fedbn_simulations.experiments.compare import compare, rank_candidates, resume, tuning_tasks
from fedbn_simulations.experiments.experiment import Experiment, read_run_file
from fedbn_simulations.experiments.preflight import default_directory, drop_unsupported, preflight
from fedbn_simulations.experiments.tasks import CHECKPOINT
from fedbn_simulations.report.documents import update_document
from fedbn_simulations.results.comparison import Comparison
from fedbn_simulations.storage import checkpoint as store
from fedbn_simulations.storage import provenance
from tests.helpers import same, wait_until

COMMAND = (
    sys.executable,
    "-m",
    "fedbn",
    "compare",
    "digits8",
    "--strategies",
    "fedbn,silobn",
    "--workers",
    "2",
)


SCENARIO = "digits8:users=4:unseen=1:images=600"


def experiment(*strategies, **settings):
    plan = plan_for(SCENARIO, **{"rounds": 2, "global_test": 60, "eval_every": 2} | settings.pop("plan", {}))
    return Experiment(SCENARIO, strategies or ("global-naive", "fedbn"), plan=plan, **{"seeds": 2} | settings)


def results(directory):
    paths = sorted((directory / "runs").glob("*/result.json"))
    return {p.parent.name: read_json(p) | {"seconds": None, "cpu_seconds": None, "phases": None} for p in paths}


def start(out, *options, **settings):
    """Start a comparison in its own process group, and return the process when it has a checkpoint."""
    process = subprocess.Popen([*COMMAND, *options, "--out", str(out)], start_new_session=True, **settings)
    wait_until(lambda: list(out.glob(f"runs/*/{CHECKPOINT}")) or process.poll() is not None)
    return process


def test_compare_runs_every_strategy_with_every_seed(tmp_path):
    compare(experiment(), tmp_path, workers=1)
    assert {(r["strategy"], r["seed"]) for r in results(tmp_path).values()} == {
        (s, k) for s in ("global-naive", "fedbn") for k in (0, 1)
    }
    matrix = Comparison.load(tmp_path).matrix()
    own = matrix.query("strategy == 'fedbn' and row == 'own' and column == 'aggregated'")
    by_user = {}
    for r in results(tmp_path).values():
        for e in r["evaluations"]:
            if r["strategy"] == "fedbn" and (e["row"], e["column"]) == ("own", "aggregated"):
                by_user.setdefault(e["user"], []).append(e["accuracy"])
    assert sum(map(len, by_user.values())) == 3 * 2
    expected = sum(sum(v) / len(v) for v in by_user.values()) / len(by_user)
    assert float(own["mean"].iloc[0]) == pytest.approx(expected)
    meta = json.loads((tmp_path / "comparison.json").read_text())
    assert meta["versions"]["flwr"]
    assert json.loads((tmp_path / "shift.json").read_text())["layers"]


def test_paired_seeds_share_users_weights_and_shuffles(tmp_path):
    compare(experiment("global-naive", "global-pooled", seeds=1), tmp_path, workers=1)
    a, b = results(tmp_path).values()
    assert [p["train_loss"] for p in a["curve"]] == [p["train_loss"] for p in b["curve"]]


@pytest.mark.slow
def test_results_do_not_depend_on_workers(tmp_path):
    compare(experiment(), tmp_path / "one", workers=1)
    compare(experiment(), tmp_path / "two", workers=2)
    assert results(tmp_path / "one") == results(tmp_path / "two")


def test_scenario_rates_unless_rate_is_given():
    named = Experiment.from_dict({"scenario": "hapt", "strategies": ["fedbn", "groupnorm"]})
    assert named.run("groupnorm", 0).plan.lr == 0.03
    assert named.run("fedbn", 0).plan.lr == named.plan.lr == 0.05
    assert named.run("groupnorm", 0, tuned={"lr": 0.2}).plan.lr == 0.2
    given = Experiment.from_dict({"scenario": "hapt", "plan": {"lr": 0.05}})
    assert given.run("groupnorm", 0).plan.lr == 0.05
    assert Experiment.from_dict(named.to_dict()) == named
    alias = Experiment.from_dict({"scenario": "hapt", "strategies": ["fedavg"], "rates": {"FedAvg": 0.2}}).resolved()
    assert alias.run(*alias.strategies, 0).plan.lr == 0.2
    with pytest.raises(UserError, match="rates must be positive learning rates; look at fedbn"):
        Experiment.from_dict({"scenario": "hapt", "rates": {"fedbn": 0.0}}).resolved()


@pytest.mark.slow
def test_stacked_results_do_not_depend_on_workers(tmp_path):
    what = experiment(seeds=1, plan={"rounds": 1})
    for workers in (1, 2):
        compare(what, tmp_path / str(workers), workers=workers, engine="grid:stacked")
    assert results(tmp_path / "1") == results(tmp_path / "2")


@pytest.mark.parametrize("engine", ["grd", "grid:stackd", "ray:stacked"])
def test_compare_rejects_unknown_engine(tmp_path, engine):
    with pytest.raises(UserError, match="unknown engine 'grd'.*grid|'stackd'.*stacked|a Ray cluster is addressed as"):
        compare(experiment(seeds=1), tmp_path / "x", workers=1, engine=engine)
    assert not (tmp_path / "x").exists()


def test_engines_give_same_results(tmp_path):
    compare(experiment(seeds=1), tmp_path / "grid", workers=1)
    compare(experiment(seeds=1), tmp_path / "reference", workers=1, engine="reference")
    assert results(tmp_path / "grid") == results(tmp_path / "reference")


class Stopped(Exception):
    pass


SLOW_ENGINES = [pytest.param(name, marks=pytest.mark.slow) for name in ("reference", "grid")]


@pytest.mark.parametrize("engine", ["grid:stacked", *SLOW_ENGINES])
def test_resume_after_any_round_is_bit_identical(tmp_path, engine):
    what = experiment("fedbn", "global-recalibrated", seeds=1, plan={"rounds": 3, "clients_per_round": 3})
    what = replace(what, plan=replace(what.plan, optimizer_state="keep", server_optimizer="fedadam", server_lr=0.1))
    compare(what, tmp_path / "whole", workers=1, engine=engine)
    for stop in (1, 3, 4, 6):
        events = []

        def report(event, events=events, stop=stop):
            events.append(event)
            if sum(not e.ended for e in events) == stop:
                raise Stopped

        out = tmp_path / f"stopped{stop}"
        with pytest.raises(Stopped):
            compare(what, out, workers=1, engine=engine, report=report)
        resume(out, workers=1)
        assert results(out) == results(tmp_path / "whole")


@pytest.mark.parametrize("metric", ["", "macro_f1"])
def test_resume_of_tuned_comparison_continues(tmp_path, metric):
    what = experiment("fedbn", seeds=1, plan={"rounds": 2}, tune={"lr": ("0.1", "0.3")}, metric=metric)
    compare(what, tmp_path, workers=1)
    before = results(tmp_path)
    shutil.rmtree(next((tmp_path / "runs").iterdir()))
    resume(tmp_path, workers=1)
    assert results(tmp_path) == before
    assert read_json(tmp_path / "comparison.json")["metric"] == (metric or "accuracy")


@pytest.mark.slow
def test_resume_after_kill_is_bit_identical(tmp_path):
    options = ("--rounds", "20", "--seeds", "2")
    subprocess.run([*COMMAND, *options, "--out", str(tmp_path / "whole")], check=True, capture_output=True)
    out = tmp_path / "killed"
    process = start(out, *options, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert len(results(out)) < 4
    subprocess.run([sys.executable, "-m", "fedbn", "resume", str(out)], check=True, capture_output=True)
    assert results(out) == results(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_compare_leaves_no_process(tmp_path, number):
    out = tmp_path / "stopped"
    settings = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    settings["preexec_fn"] = lambda: signal.signal(signal.SIGINT, signal.default_int_handler)
    process = start(out, "--rounds", "200", "--seeds", "1", **settings)
    os.kill(process.pid, number) if number == signal.SIGTERM else os.killpg(process.pid, number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert f"interrupted; resume with fedbn resume {out}" in " ".join(errors.split()).replace("/ ", "/")
    assert wait_until(lambda: _gone(process.pid), 15)


@pytest.mark.slow
def test_killed_compare_leaves_no_worker(tmp_path):
    tracker = ("--track", f"tensorboard:{tmp_path / 'logs'}")
    process = start(tmp_path / "killed", "--rounds", "200", "--seeds", "1", *tracker, stderr=subprocess.DEVNULL)
    process.kill()
    process.wait()
    assert wait_until(lambda: _gone(process.pid), 15)


def _gone(group):
    """Whether a process group has no members left."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return True
    return False


@pytest.mark.slow
def test_learning_rates_are_tuned_on_validation_data(tmp_path):
    what = experiment("global-naive", "groupnorm", seeds=1, tune={"lr": ("1e-6", "0.05")}, plan={"rounds": 4})
    compare(what, tmp_path, workers=1)
    tasks = tuning_tasks(what.resolved(), tmp_path)
    assert len(tasks) == 4
    ranked = rank_candidates(what, tasks, "accuracy", True)
    assert {s: found[0] for s, found in ranked.items()} == {"global-naive": {"lr": 0.05}, "groupnorm": {"lr": 0.05}}
    assert {r["lr"] for r in results(tmp_path).values()} == {0.05}
    assert all(t.run.validation for t in tasks)
    page = tmp_path / "page.md"
    page.write_text(f"<!-- begin {tmp_path.name} -->\n<!-- end {tmp_path.name} -->\n")
    update_document(tmp_path, page, full=True)
    assert "Tuned: global-naive lr=0.05, groupnorm lr=0.05." in page.read_text()


def test_unsupported_tuning_is_rejected_before_any_run(tmp_path):
    """With this partition only unseen users have known groups, and tuning has no unseen users."""
    what = experiment("fednorm", "global-pooled", tune={"lr": ("0.05",)}, partition="iid:clients=4").resolved()
    assert drop_unsupported(replace(what, tune={}))[0].strategies == ("fednorm", "global-pooled")
    supported, notices = drop_unsupported(what)
    assert supported.strategies == ("global-pooled",)
    assert "fednorm" in notices[0]
    with pytest.raises(UserError, match="users of known groups"):
        compare(what, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_preflight_does_not_repeat_checks(tmp_path, monkeypatch):
    what = experiment("fedbn", "centralized", plan={"batch_size": 512}).resolved()
    supported, found = drop_unsupported(what)
    assert supported == what
    assert any("fewer training examples" in notice for notice in found)
    assert preflight(what, tmp_path) == list(dict.fromkeys(found))
    monkeypatch.setattr("fedbn_simulations.experiments.preflight.build_context", None)
    assert preflight(what, tmp_path, checked=found) == list(dict.fromkeys(found))


def test_validation_data_come_from_training_rows_only(small):
    full, validation = build_context(small()), build_context(small(validation=True))
    assert validation.population.unseen == ()
    for user, i in zip(validation.population.users, full.population.seen, strict=True):
        source = {tuple(r.flatten().tolist()) for r in full.population.users[i].train.x}
        train = {tuple(r.flatten().tolist()) for r in user.train.x}
        test = {tuple(r.flatten().tolist()) for r in user.test.x}
        assert train | test <= source
        assert not train & test


# Errors --------------------------------------------------------------------------------------------------------------


def test_resume_rejects_other_numerics(tmp_path, monkeypatch):
    compare(experiment(seeds=1), tmp_path, workers=1)
    monkeypatch.setattr(provenance, "NUMERICS", provenance.NUMERICS + 1)
    with pytest.raises(UserError, match="was computed with other numerics .* start again with another --out"):
        resume(tmp_path, workers=1)
    with pytest.raises(UserError, match="result.json was computed with other numerics"):
        compare(experiment(seeds=1), tmp_path, workers=1)


def test_load_outcome_rejects_mismatch(tmp_path, monkeypatch, small):
    run = small("fedbn", rounds=1)
    outcome = federate(run)
    path = tmp_path / CHECKPOINT
    store.save_outcome(path, run, outcome, {"data": "abc"})
    assert store.load_outcome(path, run, {"data": "abc"}).curve == outcome.curve
    with pytest.raises(UserError, match="was written for other data"):
        store.load_outcome(path, run, {"data": "abd"})
    with pytest.raises(UserError, match="belongs to another run"):
        store.load_outcome(path, replace(run, seed=9))
    for module, name, value, message in (
        (provenance, "NUMERICS", provenance.NUMERICS + 1, "was computed with other numerics"),
        (store, "versions", lambda: {}, "was written with other versions"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, value)
            with pytest.raises(UserError, match=message):
                store.load_outcome(path, run)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UserError, match="cannot be read .*: delete it and resume"):
        store.load_outcome(path, run)


def test_outcome_round_trip_is_exact(tmp_path, small):
    run = small("global-recalibrated", rounds=1)
    outcome = federate(run)
    outcome.execution = {"train": ["stacked", "a reason"]}
    store.save_outcome(tmp_path / "x", run, outcome)
    loaded = store.load_outcome(tmp_path / "x", run)
    assert loaded.scores == outcome.scores
    assert loaded.execution == outcome.execution
    assert same(loaded.server.state, outcome.server.state)
    assert same(loaded.server.serving, outcome.server.serving)


def test_compare_does_not_overwrite_other_comparison(tmp_path):
    compare(experiment("fedbn", seeds=1), tmp_path, workers=1)
    with pytest.raises(UserError, match="has another comparison; choose another --out"):
        compare(experiment("silobn", seeds=1), tmp_path, workers=1)


def test_default_directory_is_stable_and_unique(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first, second = (experiment(name, seeds=1).resolved() for name in ("fedbn", "silobn"))
    directory = default_directory(first)
    assert str(directory) == "results/digits8"
    directory.mkdir(parents=True)
    write_json(directory / "comparison.json", {"experiment": first.to_dict()})
    assert default_directory(first) == directory
    assert default_directory(second) != directory
    assert default_directory(second) == default_directory(second)
    assert default_directory(second).name.startswith("digits8-")


def test_resume_without_comparison(tmp_path):
    with pytest.raises(UserError, match="has no comparison .* start one with `fedbn compare`"):
        resume(tmp_path)


def test_unwritable_output_is_reported(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write to .*; choose another --out"):
        compare(experiment(), tmp_path / "file" / "out", workers=1)
    with pytest.raises(UserError, match="cannot write .*; choose another --out or free disk space"):
        store.write_atomically(tmp_path / "file" / "x", b"")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "no scenario given: see `fedbn list scenarios`"),
        ({"scenario": "digits8", "strategy": "fedbn"}, "Did you mean 'strategies'"),
        ({"scenario": "digits8", "plan": {"epochs": 3}}, r"unknown option of plan 'epochs'"),
        ({"scenario": "digits8", "seeds": 0}, "seeds must be at least 1"),
        ({"scenario": "digits8", "strategies": ["fedbn", "fedbn"]}, "strategies given twice: fedbn"),
        ({"scenario": "digits8", "strategies": []}, "no strategy given"),
        ({"scenario": "digits8", "tune": {"lr": [0.1, -1]}}, "lr must be positive"),
    ],
)
def test_experiment_rejects_bad_input(values, message):
    with pytest.raises(UserError, match=message):
        Experiment.from_dict(values).resolved()


def test_read_run_file(tmp_path):
    file = tmp_path / "run.toml"
    file.write_text('scenario = "digits8"\nstrategies = ["fedbn"]\nseeds = 2\n[plan]\nrounds = 3\n')
    read = Experiment.from_dict(read_run_file(file))
    assert (read.strategies, read.seeds, read.plan.rounds) == (("fedbn",), 2, 3)
    assert Experiment.from_dict(read.to_dict()) == read
    file.write_text("scenario = ")
    with pytest.raises(UserError, match="is not valid TOML"):
        read_run_file(file)
    with pytest.raises(UserError, match="cannot read run file"):
        read_run_file(tmp_path / "none.toml")

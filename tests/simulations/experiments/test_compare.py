from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch

from fedbn.errors import UserError
from fedbn.federation.loop import federate
from fedbn.federation.run import plan_for
from simulations.experiments.compare import chosen_rates, compare, resume, tuning_tasks
from simulations.experiments.experiment import Experiment, read_run_file
from simulations.experiments.preflight import default_place, suited
from simulations.experiments.tasks import CHECKPOINT
from simulations.report.documents import update_document
from simulations.results.comparison import Comparison
from simulations.storage import checkpoint as store
from simulations.storage import provenance


def experiment(*strategies, **settings):
    plan = plan_for("digits8", **{"rounds": 2, "global_test": 60, "eval_every": 2} | settings.pop("plan", {}))
    return Experiment("digits8", strategies or ("global-naive", "fedbn"), plan=plan, **{"seeds": 2} | settings)


def results(directory):
    out = {}
    for path in sorted((directory / "runs").glob("*/result.json")):
        result = json.loads(path.read_text())
        del result["seconds"]
        out[path.parent.name] = result
    return out


def test_a_comparison_holds_every_strategy_with_every_seed(tmp_path):
    compare(experiment(), tmp_path, workers=1)
    loaded = Comparison.load(tmp_path)
    assert {(r["strategy"], r["seed"]) for r in results(tmp_path).values()} == {
        (s, k) for s in ("global-naive", "fedbn") for k in (0, 1)
    }
    matrix = loaded.matrix()
    own = matrix[(matrix.strategy == "fedbn") & (matrix.row == "own") & (matrix.column == "aggregated")]
    users = [
        e["accuracy"]
        for r in results(tmp_path).values()
        if r["strategy"] == "fedbn"
        for e in r["evaluations"]
        if (e["row"], e["column"]) == ("own", "aggregated")
    ]
    by_user = {}
    for r in results(tmp_path).values():
        for e in r["evaluations"]:
            if r["strategy"] == "fedbn" and (e["row"], e["column"]) == ("own", "aggregated"):
                by_user.setdefault(e["user"], []).append(e["accuracy"])
    assert len(users) == 16
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
def test_two_workers_give_the_numbers_of_one(tmp_path):
    compare(experiment(), tmp_path / "one", workers=1)
    compare(experiment(), tmp_path / "two", workers=2)
    assert results(tmp_path / "one") == results(tmp_path / "two")


def test_a_scenario_may_name_rates_unless_one_is_given():
    named = Experiment.from_dict({"scenario": "hapt", "strategies": ["fedbn", "groupnorm"]})
    assert named.run("groupnorm", 0).plan.lr == 0.03
    assert named.run("fedbn", 0).plan.lr == named.plan.lr == 0.05
    assert named.run("groupnorm", 0, lr=0.2).plan.lr == 0.2
    given = Experiment.from_dict({"scenario": "hapt", "plan": {"lr": 0.05}})
    assert given.run("groupnorm", 0).plan.lr == 0.05
    assert Experiment.from_dict(named.to_dict()) == named
    with pytest.raises(UserError, match="rates must be positive learning rates; look at fedbn"):
        Experiment.from_dict({"scenario": "hapt", "rates": {"fedbn": 0.0}}).resolved()


@pytest.mark.slow
def test_stacked_numbers_do_not_depend_on_how_many_processes_share_the_work(tmp_path):
    what = experiment(seeds=1, plan={"rounds": 1})
    for workers in (1, 2):
        compare(what, tmp_path / str(workers), workers=workers, engine="grid:stacked")
    assert results(tmp_path / "1") == results(tmp_path / "2")


@pytest.mark.parametrize("engine", ["grd", "grid:stackd", "ray:stacked"])
def test_an_engine_that_is_none_is_refused_before_anything_runs(tmp_path, engine):
    with pytest.raises(UserError, match="unknown engine 'grd'.*grid|'stackd'.*stacked|a Ray cluster is addressed as"):
        compare(experiment(seeds=1), tmp_path / "x", workers=1, engine=engine)
    assert not (tmp_path / "x").exists()


def test_engines_give_the_same_results(tmp_path):
    compare(experiment(seeds=1), tmp_path / "grid", workers=1)
    compare(experiment(seeds=1), tmp_path / "reference", workers=1, engine="reference")
    assert results(tmp_path / "grid") == results(tmp_path / "reference")


class Stopped(Exception):
    pass


SLOW_ENGINES = [pytest.param(name, marks=pytest.mark.slow) for name in ("reference", "grid")]


@pytest.mark.parametrize("engine", ["grid:stacked", *SLOW_ENGINES])
def test_stopped_after_any_round_and_resumed_is_bit_identical(tmp_path, engine):
    what = experiment("fedbn", "global-recalibrated", seeds=1, plan={"rounds": 3, "clients_per_round": 3})
    what = replace(what, plan=replace(what.plan, optimizer_state="keep", server_optimizer="fedadam", server_lr=0.1))
    compare(what, tmp_path / "whole", workers=1, engine=engine)
    for stop in (1, 3, 4, 6):
        events = []

        def report(event, events=events, stop=stop):
            events.append(event)
            if sum(not e.ended for e in events) == stop:
                raise Stopped

        place = tmp_path / f"stopped{stop}"
        with pytest.raises(Stopped):
            compare(what, place, workers=1, engine=engine, report=report)
        resume(place, workers=1)
        assert results(place) == results(tmp_path / "whole")


@pytest.mark.slow
def test_kill_minus_nine_and_resume_is_bit_identical(tmp_path):
    command = [
        sys.executable,
        "-m",
        "simulations",
        "compare",
        "digits8",
        "--strategies",
        "fedbn,silobn",
    ]
    command += ["--rounds", "6", "--seeds", "2", "--workers", "2"]
    subprocess.run([*command, "--out", str(tmp_path / "whole")], check=True, capture_output=True)
    place = tmp_path / "killed"
    process = subprocess.Popen(
        [*command, "--out", str(place)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    deadline = time.monotonic() + 120
    while not list(place.glob(f"runs/*/{CHECKPOINT}")) and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.4)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    finished = len(results(place))
    assert finished < 4
    subprocess.run([sys.executable, "-m", "simulations", "resume", str(place)], check=True, capture_output=True)
    assert results(place) == results(tmp_path / "whole")


@pytest.mark.slow
def test_an_interruption_says_how_to_go_on_and_leaves_no_process(tmp_path):
    place = tmp_path / "stopped"
    command = [sys.executable, "-m", "simulations", "compare", "digits8", "--strategies", "fedbn,silobn"]
    process = subprocess.Popen(
        [*command, "--rounds", "200", "--seeds", "1", "--workers", "2", "--out", str(place)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    deadline = time.monotonic() + 120
    while not list(place.glob(f"runs/*/{CHECKPOINT}")) and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert f"interrupted; go on with fedbn resume {place}" in " ".join(errors.split()).replace("/ ", "/")
    assert _gone(process.pid)


def _gone(group, within=15.0):
    """Whether a process group has no members left, reaped ones included."""
    end = time.monotonic() + within
    while time.monotonic() < end:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.1)
    return False


def test_learning_rates_are_chosen_on_validation_data_of_seen_users(tmp_path):
    what = experiment("global-naive", "groupnorm", seeds=1, tune=(1e-6, 0.05), plan={"rounds": 4})
    compare(what, tmp_path, workers=1)
    tasks = tuning_tasks(what.resolved(), tmp_path)
    assert len(tasks) == 4
    assert chosen_rates(tasks) == {"global-naive": 0.05, "groupnorm": 0.05}
    assert {r["lr"] for r in results(tmp_path).values()} == {0.05}
    assert all(t.run.validation for t in tasks)
    page = tmp_path / "page.md"
    page.write_text(f"<!-- begin {tmp_path.name} -->\n<!-- end {tmp_path.name} -->\n")
    update_document(tmp_path, page, full=True)
    assert "Learning rates, tuned: global-naive 0.05, groupnorm 0.05." in page.read_text()


def test_what_cannot_be_tuned_is_known_before_anything_runs(tmp_path):
    """Dealt anew, only the unseen users have groups of their own; and tuning has none of those."""
    what = experiment("fednorm", "global-pooled", tune=(0.05,), partition="iid:clients=4").resolved()
    assert suited(replace(what, tune=()))[0].strategies == ("fednorm", "global-pooled")
    kept, notices = suited(what)
    assert kept.strategies == ("global-pooled",)
    assert "fednorm" in notices[0]
    with pytest.raises(UserError, match="users of known groups"):
        compare(what, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_validation_data_come_from_training_rows_only(small):
    from fedbn.federation.setup import build_context

    whole, held = build_context(small()), build_context(small(validation=True))
    assert held.population.unseen == ()
    for user, i in zip(held.population.users, whole.population.seen, strict=True):
        source = {tuple(r.flatten().tolist()) for r in whole.population.users[i].train.x}
        train = {tuple(r.flatten().tolist()) for r in user.train.x}
        test = {tuple(r.flatten().tolist()) for r in user.test.x}
        assert train | test <= source
        assert not train & test


# Mistakes ------------------------------------------------------------------------------------------------------------


def test_resume_refuses_other_numerics(tmp_path, monkeypatch):
    compare(experiment(seeds=1), tmp_path, workers=1)
    monkeypatch.setattr(provenance, "NUMERICS", provenance.NUMERICS + 1)
    with pytest.raises(UserError, match="was computed with other numerics .* start again with another --out"):
        resume(tmp_path, workers=1)
    with pytest.raises(UserError, match="result.json was computed with other numerics"):
        compare(experiment(seeds=1), tmp_path, workers=1)


def test_load_outcome_refuses_other_numerics_data_versions_or_run(tmp_path, monkeypatch, small):
    run = small("fedbn", rounds=1)
    outcome = federate(run)
    path = tmp_path / CHECKPOINT
    store.save_outcome(path, run, outcome, {"data": "abc"})
    assert store.load_outcome(path, run, {"data": "abc"}).curve == outcome.curve
    with pytest.raises(UserError, match="was made on other data"):
        store.load_outcome(path, run, {"data": "abd"})
    with pytest.raises(UserError, match="belongs to another run"):
        store.load_outcome(path, replace(run, seed=9))
    with monkeypatch.context() as patch:
        patch.setattr(provenance, "NUMERICS", provenance.NUMERICS + 1)
        with pytest.raises(UserError, match="was computed with other numerics"):
            store.load_outcome(path, run)
    with monkeypatch.context() as patch:
        patch.setattr(store, "versions", lambda: {})
        with pytest.raises(UserError, match="was made with other versions"):
            store.load_outcome(path, run)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UserError, match="cannot be read .*: delete it and resume"):
        store.load_outcome(path, run)


def test_an_outcome_survives_the_disk_to_the_last_bit(tmp_path, small):
    run = small("global-recalibrated", rounds=1)
    outcome = federate(run)
    store.save_outcome(tmp_path / "x", run, outcome)
    back = store.load_outcome(tmp_path / "x", run)
    assert back.scores == outcome.scores
    for a, b in ((back.server.state, outcome.server.state), (back.server.serving, outcome.server.serving)):
        assert a.keys() == b.keys()
        assert all(torch.equal(a[k], b[k]) for k in a)


def test_another_comparison_is_not_overwritten(tmp_path):
    compare(experiment("fedbn", seeds=1), tmp_path, workers=1)
    with pytest.raises(UserError, match="holds another comparison; choose another --out"):
        compare(experiment("silobn", seeds=1), tmp_path, workers=1)


def test_what_nobody_named_a_place_for_gets_one_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first, second = (experiment(name, seeds=1).resolved() for name in ("fedbn", "silobn"))
    place = default_place(first)
    assert str(place) == "results/digits8"
    place.mkdir(parents=True)
    (place / "comparison.json").write_text(json.dumps({"experiment": first.to_dict()}))
    assert default_place(first) == place
    assert default_place(second) != place
    assert default_place(second) == default_place(second)
    assert default_place(second).name.startswith("digits8-")


def test_nothing_to_resume(tmp_path):
    with pytest.raises(UserError, match="holds no comparison .* start one with `fedbn compare`"):
        resume(tmp_path)


def test_an_output_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write to .*; choose another --out"):
        compare(experiment(), tmp_path / "file" / "out", workers=1)
    with pytest.raises(UserError, match="cannot write .*; choose another --out or free the disk"):
        store.write_atomically(tmp_path / "file" / "x", b"")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "no scenario given: see `fedbn list scenarios`"),
        ({"scenario": "digits8", "strategy": "fedbn"}, "Did you mean 'strategies'"),
        ({"scenario": "digits8", "plan": {"epochs": 3}}, r"unknown setting in \[plan\] 'epochs'"),
        ({"scenario": "digits8", "seeds": 0}, "--seeds must be at least 1"),
        ({"scenario": "digits8", "strategies": ["fedbn", "fedbn"]}, "strategies given twice: fedbn"),
        ({"scenario": "digits8", "strategies": []}, "no strategy given"),
        ({"scenario": "digits8", "tune": [0.1, -1]}, "must be positive"),
    ],
)
def test_a_wrong_experiment_names_the_mistake(values, message):
    with pytest.raises(UserError, match=message):
        Experiment.from_dict(values).resolved()


def test_run_files_say_what_the_command_line_says(tmp_path):
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

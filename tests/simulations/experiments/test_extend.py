from __future__ import annotations

import pytest

from fedbn.errors import UserError
from fedbn.federation.loop import federate
from fedbn.federation.run import plan_for
from fedbn.federation.setup import build_context
from fedbn.files import read_json
from fedbn.strategies.base import strategies
from fedbn_simulations.experiments import tasks
from fedbn_simulations.experiments.compare import compare, resume
from fedbn_simulations.experiments.experiment import Experiment
from fedbn_simulations.results.comparison import Comparison
from tests.helpers import same


def experiment(*strategies, seeds=1, **plan):
    plan = plan_for("digits8:images=600", **{"rounds": 2, "global_test": 60, "eval_every": 2} | plan)
    return Experiment("digits8:images=600", strategies or ("fedbn",), plan=plan, seeds=seeds)


def results(directory):
    paths = sorted((directory / "runs").glob("*/result.json"))
    return {p.parent.name: read_json(p) | {"seconds": None, "cpu_seconds": None, "phases": None} for p in paths}


@pytest.fixture
def executed(monkeypatch):
    """The first round of every run that is executed, by strategy."""
    first, execute = {}, tasks.execute

    def record(run, engine, resume, *rest):
        first[run.strategy] = len(resume.curve) + 1 if resume else 1
        return execute(run, engine, resume, *rest)

    monkeypatch.setattr(tasks, "execute", record)
    return first


@pytest.mark.slow
def test_resume_with_more_rounds_extends_every_run_to_the_same_numbers(tmp_path, executed):
    compare(experiment("fedbn", "fedtan", "fixbn", "fedbn+scaffold"), tmp_path / "extended", workers=1)
    executed.clear()
    resume(tmp_path / "extended", 4, workers=1)
    assert executed == {"fedbn": 3, "fedtan": 3, "fixbn": 1, "fedbn+scaffold": 3}
    compare(experiment("fedbn", "fedtan", "fixbn", "fedbn+scaffold", rounds=4), tmp_path / "whole", workers=1)
    assert results(tmp_path / "extended") == results(tmp_path / "whole")
    assert Comparison.load(tmp_path / "extended").missing == 0


@pytest.mark.slow
def test_interrupted_extension_is_resumed_and_extended_again(tmp_path, monkeypatch, executed):
    compare(experiment(seeds=2), tmp_path / "extended", workers=1)
    pack = tasks.pack_outcome

    def interrupt(run, outcome, *rest):
        if len(outcome.curve) == 4:
            raise KeyboardInterrupt
        return pack(run, outcome, *rest)

    monkeypatch.setattr(tasks, "pack_outcome", interrupt)
    with pytest.raises(KeyboardInterrupt):
        resume(tmp_path / "extended", 4, workers=1)
    with pytest.raises(UserError, match="no finished run yet"):
        Comparison.load(tmp_path / "extended")  # shorter runs are not mixed with longer ones
    monkeypatch.setattr(tasks, "pack_outcome", pack)
    resume(tmp_path / "extended", 6, workers=1)
    assert executed["fedbn"] == 3  # of the second seed, which the interrupted extension had not reached
    compare(experiment(rounds=6, seeds=2), tmp_path / "whole", workers=1)
    assert results(tmp_path / "extended") == results(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize(("plan", "first"), [({"schedule": "cosine"}, 1), ({"rounds": 3}, 1), ({}, 3)])
def test_runs_start_again_if_their_first_rounds_would_differ(tmp_path, executed, plan, first):
    compare(experiment(**plan), tmp_path, workers=1)
    resume(tmp_path, 4, workers=1)
    assert executed["fedbn"] == first


@pytest.mark.slow
def test_more_rounds_in_the_same_directory_suggest_to_extend(tmp_path, run_cli):
    command = ("compare", "digits8:images=600", "--strategies", "fedbn", "--seeds", 1, "--out", "out")
    assert run_cli(*command, "--rounds", 1)[0] == 0
    before = results(tmp_path / "out")
    code, _, error = run_cli(*command, "--rounds", 2)
    assert code == 2
    assert "fedbn resume out --rounds 2" in error
    code, _, error = run_cli(*command, "--rounds", 2, "--lr", 0.5)
    assert "resume" not in error
    assert "choose another --out" in error
    assert results(tmp_path / "out") == before
    assert run_cli("resume", "out", "--rounds", 2, "--workers", 1)[0] == 0
    assert {r["rounds"] for r in results(tmp_path / "out").values()} == {2}
    recorded = read_json(tmp_path / "out" / "comparison.json")["command"]
    assert recorded == "fedbn compare digits8:images=600 --strategies fedbn --seeds 1 --out out --rounds 2"
    code, _, error = run_cli("resume", "out", "--rounds", 1)
    assert code == 2
    assert "already has 2 rounds" in error


@pytest.mark.slow
def test_resume_with_more_seeds_computes_only_those(tmp_path, run_cli, executed):
    command = ("compare", "digits8:images=600", "--strategies", "fedbn", "--rounds", 1, "--workers", 1)
    assert run_cli(*command, "--tune", "lr=0.1,0.3", "--seeds=1", "--out", "out")[0] == 0
    before = results(tmp_path / "out")
    executed.clear()
    assert run_cli("resume", "out", "--seeds", 2, "--workers", 1)[0] == 0
    assert executed == {"fedbn": 1}
    assert len(found := results(tmp_path / "out")) == 2
    assert found | before == found
    assert run_cli(*command, "--tune", "lr=0.1,0.3", "--seeds", 2, "--out", "whole")[0] == 0
    whole = results(tmp_path / "whole")
    assert {name: r["evaluations"] for name, r in found.items()} == {n: r["evaluations"] for n, r in whole.items()}
    stored = read_json(tmp_path / "out" / "comparison.json")
    assert stored["command"].endswith("--out out --seeds 2")
    assert stored["seeds"] == [0, 1]
    code, _, error = run_cli("resume", "out", "--seeds", 1)
    assert code == 2
    assert "already has 2 seeds up to 1: give --seeds a number above 1" in error


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n, kind in strategies().items() if not kind.depends_on_rounds])
def test_first_rounds_do_not_depend_on_the_number_of_rounds(small, name):
    try:
        run = small(name, model="mlp", rounds=2, eval_every=8).resolved()
        ctx = build_context(run)
    except UserError as error:
        pytest.skip(str(error))

    class Stopped(Exception):
        pass

    long, short = small(name, model="mlp", rounds=8, eval_every=8), federate(run, ctx=ctx)
    found = []

    def stop(number, outcome):
        if number == 2:
            found.append(outcome)
            raise Stopped

    with pytest.raises(Stopped):
        federate(long, on_round=stop)
    assert same(found[0].server.state, short.server.state)
    assert found[0].client_states.keys() == short.client_states.keys()
    assert all(same(found[0].client_states[u], short.client_states[u]) for u in short.client_states)


@pytest.mark.slow
def test_converged_runs_are_extended_without_training(tmp_path, executed):
    what = {"patience": 1, "min_delta": 9.0, "eval_every": 1}
    compare(experiment("fedbn", "fixbn", rounds=3, **what), tmp_path / "extended", workers=1)
    first = Comparison.load(tmp_path / "extended")
    assert list(first.runs["convergence"]) == ["converged", "all rounds"]
    assert any("converged, and stopped, after these rounds (--patience): fedbn 2" in n for n in first.notices)
    assert any("has all 3 rounds" in n for n in first.notices)
    executed.clear()
    resume(tmp_path / "extended", 4, workers=1)
    assert executed == {"fixbn": 1}
    compare(experiment("fedbn", "fixbn", rounds=4, **what), tmp_path / "whole", workers=1)
    assert results(tmp_path / "extended") == results(tmp_path / "whole")
    assert list(Comparison.load(tmp_path / "extended").runs["rounds"]) == [2, 4]

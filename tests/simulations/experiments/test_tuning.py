"""Tuning of any option of the plan with equal budgets, and its errors."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

import fedbn
from fedbn.errors import UserError
from fedbn.files import write_json
from fedbn.optim.adamw import AdamW
from fedbn_simulations.experiments.compare import compare, resume, tuning_tasks
from fedbn_simulations.experiments.experiment import Experiment
from fedbn_simulations.results.comparison import Comparison


def experiment(tune, strategies=("global-naive", "groupnorm:groups=2"), **options):
    plan = {"rounds": 1, "global_test": 20, "clients_per_round": 3}
    values = {"scenario": "digits8:images=900", "strategies": strategies, "seeds": 1, "tune": tune, "plan": plan}
    return Experiment.from_dict(values | options).resolved()


def test_every_strategy_has_the_same_candidates(tmp_path):
    optimizers, norms = ("sgd", "adamw:weight_decay=0.01"), ("none", 1)
    what = experiment({"lr": (0.001, 0.01), "optimizer": optimizers, "max_grad_norm": norms})
    assert what.tune == {"lr": ("0.001", "0.01"), "optimizer": ("sgd", "adamw"), "max_grad_norm": ("None", "1.0")}
    tasks = tuning_tasks(what, tmp_path)
    assert Counter(t.run.strategy for t in tasks) == {"global-naive": 8, "groupnorm:groups=2": 8}
    plans = [
        [(t.run.plan.lr, t.run.plan.optimizer, t.run.plan.max_grad_norm) for t in tasks if t.run.strategy == s]
        for s in what.strategies
    ]
    assert plans[0] == plans[1]
    assert len({*plans[0]}) == 8
    assert {t.run.plan.rounds for t in tasks} == {1}
    assert all(t.run.validation for t in tasks)
    assert Experiment.from_dict(what.to_dict()).resolved() == what


@pytest.mark.slow
def test_selected_options_are_used_and_shown(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = fedbn.compare(
        "digits8",
        ["global-naive", "fedbn"],
        tune={"optimizer": [AdamW(weight_decay=0.1)], "lr": [1e-6, 0.01]},
        seeds=1,
        rounds=2,
        global_test=20,
        progress=False,
        out=tmp_path / "out",
    )
    assert result.meta["settings"]["tuned"] == ", ".join(
        f"{s} optimizer=adamw:weight_decay=0.1 lr=0.01" for s in ("global-naive", "fedbn")
    )
    assert result.meta["settings"]["lr"] == "tuned"
    assert result.meta["settings"]["tuned over"] == "optimizer=adamw:weight_decay=0.1 lr=1e-06,0.01"
    assert set(result.runs["lr"]) == {0.01}


def test_halving_drops_the_worse_half_of_every_strategy(tmp_path, monkeypatch):
    """The rate .3 is best and is found, with three candidates of five after a quarter of the rounds."""
    what = experiment({"lr": (0.1, 0.2, 0.3, 0.4, 0.5)}, halvings=2, plan={"rounds": 8, "global_test": 20})
    stages = []

    def run_tasks(tasks, *args):
        stages.append(Counter((t.run.strategy, t.run.plan.rounds) for t in tasks))
        for task in tasks:
            cell = {"row": "own", "column": "aggregated", "accuracy": 1 - abs(task.run.plan.lr - 0.3)}
            assert (task.run.plan.eval_every, task.extends) == (2, tuple(r for r in (2, 4) if r < task.run.plan.rounds))
            write_json(Path(task.directory) / "result.json", {"evaluations": [cell]})

    def started(title, tasks):
        if title == "comparing":
            assert {t.run.plan.lr for t in tasks} == {0.3}
            raise Stopped

    monkeypatch.setattr("fedbn_simulations.experiments.compare.run_tasks", run_tasks)
    with pytest.raises(Stopped):
        compare(what, tmp_path / "out", workers=1, started=started)
    assert stages == [{(s, r): n for s in what.strategies} for r, n in ((2, 5), (4, 3), (8, 2))]
    assert Experiment.from_dict(what.to_dict()).resolved() == what


@pytest.mark.slow
def test_halving_continues_runs_of_the_stage_before(tmp_path):
    what = experiment({"lr": (0.01, 0.05)}, ("fedbn",), halvings=1, plan={"rounds": 2, "global_test": 20})
    rounds = []
    compare(what, tmp_path / "out", workers=1, report=lambda event: rounds.append((event.directory, event.round)))
    tuning = [(directory, number) for directory, number in rounds if "tuning" in directory]
    assert len({directory for directory, _ in tuning}) == 3, "two candidates for one round, one of them for two"
    assert [number for directory, number in tuning if directory == tuning[-1][0]] == [1, 2, 2]


def test_halving_needs_candidates_and_rounds():
    with pytest.raises(UserError, match="halvings=2 need at least 4 candidates"):
        experiment({"lr": (0.1, 0.2, 0.3)}, halvings=2, plan={"rounds": 8})
    with pytest.raises(UserError, match="halvings=1 need at least 2 rounds"):
        experiment({"lr": (0.1, 0.2)}, halvings=1)


def test_tuned_rate_wins_over_the_rate_of_a_strategy():
    what = experiment({"lr": (0.2,)}, rates={"global-naive": 0.3})
    (candidate,) = what.candidates()
    assert what.run("global-naive", 0, tuned=candidate).plan.lr == 0.2
    what = experiment({"momentum": (0.5,)}, rates={"global-naive": 0.3})
    run = what.run("global-naive", 0, tuned=what.candidates()[0])
    assert (run.plan.lr, run.plan.momentum) == (0.3, 0.5)


class Stopped(Exception):
    pass


def test_adam_state_survives_resume(tmp_path):
    plan = {"rounds": 3, "optimizer": "adam", "optimizer_state": "keep", "clients_per_round": 3, "global_test": 20}
    what = replace(experiment({}, strategies=("fedbn",)), plan=experiment({}, plan=plan).plan)
    compare(what, tmp_path / "whole", workers=1)

    def stop(event):
        if event.round == 2:
            raise Stopped

    with pytest.raises(Stopped):
        compare(what, tmp_path / "stopped", workers=1, report=stop)
    resume(tmp_path / "stopped", workers=1)
    whole, resumed = (Comparison.load(tmp_path / name).evaluations for name in ("whole", "stopped"))
    assert whole.equals(resumed)


@pytest.mark.parametrize(
    ("tune", "message"),
    [
        ({"lt": ("0.1",)}, "unknown option to tune 'lt'. Did you mean 'lr'"),
        ({"rounds": ("1", "2")}, "unknown option to tune 'rounds'"),
        ({"lr": ("a",)}, "option 'lr' must be float, not 'a'"),
        ({"lr": ("-1",)}, "lr must be positive"),
        ({"lr": ()}, "write lr=VALUE,VALUE"),
        ({"lr": 0.1}, "option 'lr' must be a list of values, not 0.1"),
        ({"lr": ("0.1", "0.10")}, "tuned twice: lr=0.1"),
        ({"optimizer": ("sgd", "adam")}, "tune lr too"),
        ({"optimizer": ("adam",), "lr": (1,), "weight_decay": ("0.1",)}, "option of sgd only"),
        ({"augment": ("flop",)}, "unknown augmentation"),
    ],
)
def test_bad_candidates_are_refused(tune, message):
    with pytest.raises(UserError, match=message):
        experiment(tune)


def test_candidates_that_do_not_fit_the_data_are_refused_before_any_run(tmp_path):
    with pytest.raises(UserError, match="augmentation 'rotate' works on 3-axis sensors"):
        compare(experiment({"augment": ("flip", "rotate")}), tmp_path / "out", workers=1)
    assert not (tmp_path / "out").exists()

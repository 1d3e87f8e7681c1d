"""Runs that train together have the results of separate runs."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from flwr.app import Message, RecordDict

from fedbn.errors import UserError
from fedbn.federation.run import Run, plan_for
from fedbn.federation.setup import build_context
from fedbn.files import read_json
from fedbn.stacked.joint import JoinedStacks, PendingStack, trainer
from fedbn.strategies.base import Progress
from fedbn_simulations.engines import together
from fedbn_simulations.engines.execute import execute
from fedbn_simulations.engines.together import run_together, runs_together
from fedbn_simulations.experiments import tasks
from fedbn_simulations.experiments.tasks import Task, grouped, run_group
from fedbn_simulations.flower.compat import task_identity
from fedbn_simulations.server.clock import cpu_seconds
from tests.helpers import mostly_slow


def execute_together(runs, **options):
    """Outcomes of runs that train together."""
    outcomes = {}

    def one(i, run):
        outcomes[i] = execute(run, "grid:stacked", **options)

    run_together([(partial(one, i, run), Path(f"{i}.log")) for i, run in enumerate(runs)])
    return [outcomes[i] for i in range(len(runs))]


@pytest.fixture
def widths(monkeypatch):
    """Numbers of runs in each joined stack from now on."""
    found, fit = [], JoinedStacks.fit
    monkeypatch.setattr(JoinedStacks, "fit", lambda self, stacks: found.append(len(stacks)) or fit(self, stacks))
    return found


def assert_close(a, b):
    """Outcomes agree up to rounding."""
    assert (a.execution, a.traffic, a.trained, len(a.curve)) == (b.execution, b.traffic, b.trained, len(b.curve))
    for x, y in [(a.server.serving, b.server.serving), *((a.client_states[u], b.client_states[u]) for u in a.trained)]:
        assert x.keys() == y.keys()
        for name in x:
            torch.testing.assert_close(x[name], y[name], rtol=1e-3, atol=1e-4)
    assert [p.train_loss for p in a.curve] == pytest.approx([p.train_loss for p in b.curve], rel=1e-4)
    assert a.scores.keys() == b.scores.keys()


CASES = {
    "seeds": ("silobn", {"seed": (0, 1, 2)}, {}),
    "rates": ("local", {"lr": (0.05, 0.02)}, {"optimizer_state": "keep", "clients_per_round": 3}),
    "hooks": ("full-norm", {"seed": (0, 1)}, {"momentum": 0.5}),
    "central": ("centralized", {"seed": (0, 1)}, {}),
}


def variants(run, seed=(0,), lr=(None,)):
    plans = [replace(run.plan, lr=rate or run.plan.lr) for rate in lr]
    return [replace(run, seed=s, plan=plan) for s in seed for plan in plans]


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_runs_together_match_separate_runs(case, small, widths):
    strategy, varied, settings = CASES[case]
    runs = variants(small(strategy, model="mlp", **settings), **varied)
    outcomes = execute_together(runs)
    assert widths == [len(runs)] * 2, "one joined stack a round"
    for run, outcome in zip(runs, outcomes, strict=True):
        assert_close(outcome, execute(run, "grid:stacked"))
        assert 0 < outcome.phases["training"] < outcome.cpu_seconds


class Waiting(PendingStack):
    """A stack with a number of steps, which matches all others."""

    steps = 0

    def __init__(self, steps):
        vars(self).update(steps=steps, progress=Progress(1, 1))

    def matches(self, other):
        return True


def test_runs_count_their_own_time_and_share_that_of_joined_stacks(monkeypatch):
    now, counted = [0.0], {}
    monkeypatch.setattr("time.process_time", lambda: now[0])

    def spend(seconds):
        now[0] += seconds

    def run(name, seconds, steps):
        start = cpu_seconds()
        spend(seconds)
        together.meet(0)
        spend(seconds)
        trainer.get()(Waiting(steps))
        counted[name] = cpu_seconds() - start

    monkeypatch.setattr(JoinedStacks, "fit", lambda self, stacks: spend(100) or [[0.0] for _ in stacks])
    run_together([(partial(run, "short", 1, 25), Path("log")), (partial(run, "long", 2, 75), Path("log"))])
    assert counted == {"short": 27, "long": 79}


@pytest.mark.slow
def test_runs_that_end_early_leave_the_others(small, widths):
    runs = variants(small("fedbn", model="mlp", rounds=4, patience=1, min_delta=0.16), seed=(0, 1, 2))
    outcomes = execute_together(runs)
    rounds = [len(outcome.curve) for outcome in outcomes]
    assert len(set(rounds)) > 1, "the seeds end after different numbers of rounds"
    assert widths == [n for r in range(1, 5) if (n := sum(number >= r for number in rounds)) > 1]
    for run, outcome in zip(runs, outcomes, strict=True):
        assert_close(outcome, execute(run, "grid:stacked"))


@pytest.mark.slow
def test_failing_joined_stack_trains_separately(small, widths, monkeypatch):
    runs = variants(small("silobn", model="mlp", rounds=3, optimizer_state="keep"), lr=(0.05, 0.02))
    expected = [execute(run, "grid:stacked") for run in runs]
    fit = JoinedStacks._fit

    def fails(self, stacks):
        if stacks[0].progress.round == 2:
            raise RuntimeError("out of memory")
        return fit(self, stacks)

    monkeypatch.setattr(JoinedStacks, "_fit", fails)
    for outcome, separate in zip(execute_together(runs), expected, strict=True):
        assert_close(outcome, separate)
    assert widths == [2, 2], "the third round does not try again"


def test_failing_run_ends_the_group(small):
    ended = []

    def run(number):
        try:
            with task_identity(1):
                together.meet(number)
                if number:
                    raise UserError("no such file")
                together.meet(2)
        finally:
            ended.append(number)

    with pytest.raises(UserError, match="no such file"):
        run_together([(partial(run, i), Path("log")) for i in range(2)])
    assert sorted(ended) == [0, 1]
    with pytest.raises(RuntimeError, match="not set"):  # Flower's identity of the process is as before
        Message(RecordDict(), 3, "train")


def stored(directory):
    """Results of all runs, without times."""
    paths = sorted(directory.glob("runs/*/result.json"))
    return {p.parent.name: read_json(p) | dict.fromkeys(("seconds", "cpu_seconds", "phases")) for p in paths}


@pytest.mark.parametrize(("saved", "rounds"), mostly_slow([(1, 2), (3, 1), (5, 0)], (3, 1)))
def test_interrupted_group_resumes_to_the_same_numbers(saved, rounds, small, tmp_path, monkeypatch, widths):
    """Runs are interrupted after one of them has stored a round, or the last one, and another one has not."""
    runs = variants(small("fedbn", model="mlp", rounds=2), seed=(0, 1))
    pack, calls = tasks.pack_outcome, []

    def interrupt(*args):
        calls.append(1)
        if len(calls) == saved + 1:
            raise KeyboardInterrupt
        return pack(*args)

    def run_all(name):
        group = [Task(run, str(tmp_path / name / "runs" / run.id)) for run in runs]
        run_group(group, "grid:stacked", lambda event: None)

    run_all("whole")
    monkeypatch.setattr(tasks, "pack_outcome", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run_all("resumed")
    assert not stored(tmp_path / "resumed")
    monkeypatch.setattr(tasks, "pack_outcome", pack)
    widths.clear()
    run_all("resumed")
    assert widths == [2] * rounds, "a run that is ahead repeats its last round"
    assert stored(tmp_path / "resumed") == stored(tmp_path / "whole")


def test_tasks_are_grouped_by_all_but_seed_and_rate(small):
    runs = variants(small("fedbn"), seed=(0, 1, 2)) + variants(small("local"), lr=(0.1, 0.2))
    groups = grouped([Task(run, run.id) for run in [runs[3], *runs[:3], runs[4]]], 2)
    assert [[t.run for t in group] for group in groups] == [runs[3:], runs[:2], runs[2:3]]


@pytest.mark.parametrize(
    ("scenario", "model", "engine", "expected"),
    [
        ("digits8", "small-cnn", "grid:stacked", 4),
        ("digits8", "small-cnn", "grid:auto", 1),
        ("digits8", "image-cnn", "grid:stacked", 4),
        ("digits8:users=40", "image-cnn", "grid:stacked", 1),
        ("digits8:users=50", "mlp", "grid:stacked", 2),
    ],
)
def test_runs_train_together_if_their_steps_are_short(scenario, model, engine, expected):
    ctx = build_context(Run(scenario, "fedbn", model=model, plan=plan_for(scenario)).resolved())
    assert runs_together(ctx, engine) == expected

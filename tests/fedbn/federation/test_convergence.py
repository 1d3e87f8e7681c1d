"""Training stops where the training loss has converged: in the same round in every engine and after a resume."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest

from fedbn.config import Plan
from fedbn.federation.convergence import convergence, convergence_notices, has_converged
from fedbn.federation.run import Run
from fedbn.federation.setup import build_context
from fedbn_simulations.engines.deployment import differences
from fedbn_simulations.engines.execute import execute

NAN = float("nan")


@pytest.mark.parametrize(
    ("losses", "stopped"),
    [
        ([1.0, 0.9, 0.8, 0.7, 0.6], None),  # improves
        ([1.0, 0.96, 0.92, 0.6, 0.6, 0.6], 3),  # each is better, but by less than 0.1 than the best one that counts
        ([1.0, 0.96, 0.85, 0.9, 0.7, 0.9, 0.7], 7),  # improvements start again
        ([1.0, NAN, NAN, 0.1], 3),
        ([NAN, NAN, 0.1], 2),
    ],
)
def test_training_converges_after_patience_evaluations_without_improvement(losses, stopped):
    plan = Plan(eval_every=1, patience=2, min_delta=0.1)
    found = [n for n in range(1, len(losses) + 1) if has_converged(plan, losses[:n])]
    assert (found[0] if found else None) == stopped
    assert not any(has_converged(Plan(eval_every=1), losses[:n]) for n in range(len(losses) + 1))


def test_loss_of_an_evaluation_is_the_mean_of_its_rounds():
    plan = Plan(eval_every=2, patience=1, min_delta=0.1)
    noisy = [1.0, 3.0, 2.0, 1.0, 0.5, 2.0]  # means 2, 1.5, 1.25
    assert not any(has_converged(plan, noisy[:n]) for n in range(7))
    assert has_converged(replace(plan, min_delta=0.3), noisy)


def test_no_rule_leaves_the_identity_of_a_run_as_it_was():
    text = Run("digits8", "fedbn").to_json()
    assert '"patience"' not in text
    assert '"min_delta"' not in text
    with_rule = Run("digits8", "fedbn", plan=Plan(patience=2))
    assert with_rule.id != Run("digits8", "fedbn", plan=Plan(patience=2, min_delta=0.5)).id


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["fedbn", "global-recalibrated"])
def test_engines_stop_in_the_same_round_and_resume_to_the_same_numbers(strategy, small):
    run = small(strategy, rounds=6, patience=1, min_delta=0.3)
    saved = {}
    whole = execute(run, "reference", on_round=lambda n, out: saved.update({n: copy.deepcopy(out)}))
    rounds = len(whole.curve)
    assert 1 < rounds < 6
    assert whole.scores
    ctx = build_context(run)
    assert (convergence(ctx, whole), convergence_notices(ctx, whole)) == ("converged", [])
    for engine in ("grid", "reference"):
        assert differences(whole, execute(run, engine)) == ()
        assert differences(whole, execute(run, engine, resume=copy.deepcopy(saved[rounds - 1]))) == ()
        assert len(execute(run, engine, resume=copy.deepcopy(saved[rounds])).curve) == rounds
    # Until it stops, training is the same as without the rule.
    assert differences(whole, execute(small(strategy, rounds=rounds), "reference")) == ()


def test_runs_that_do_not_stop_say_why(small):
    run = small("fedbn", patience=1, min_delta=0.0)
    (notice,) = convergence_notices(build_context(run), execute(run, "reference"))
    assert "did not converge within 2 rounds" in notice
    run = small("fixbn", patience=1, min_delta=9.0)
    out = execute(run, "reference")
    (notice,) = convergence_notices(build_context(run), out)
    assert len(out.curve) == 2
    assert "has all 2 rounds" in notice


@pytest.mark.ray
def test_ray_stops_in_the_same_round(small):
    run = Run("digits8:images=600", "fedbn", plan=Plan(rounds=4, eval_every=1, patience=1, min_delta=9.0)).resolved()
    whole = execute(run, "reference")
    assert len(whole.curve) == 2
    assert differences(whole, execute(run, "ray")) == ()

"""Outcomes record how the clients of a grid ran."""

from __future__ import annotations

from contextlib import suppress

from fedbn_simulations.engines.execute import execute

STACKED = {"train": ["stacked"], "evaluate": ["stacked"]}


def test_outcome_records_how_clients_ran(small):
    run, seen = small("fedbn", model="mlp", rounds=2), []
    outcome = execute(run, "grid:stacked", on_round=lambda number, partial: seen.append(dict(partial.execution)))
    assert outcome.execution == STACKED
    assert set(outcome.phases) == {"training", "evaluation", "messages"}
    assert 0 < sum(outcome.phases.values()) <= outcome.cpu_seconds
    assert seen == [STACKED, STACKED]
    assert execute(run, "grid").execution == {}


def test_resumed_outcome_unites_how_clients_ran(small, monkeypatch):
    run, partial = small("fedbn", model="mlp", rounds=2), []

    def interrupt(number, outcome):
        partial.append(outcome)
        raise KeyboardInterrupt

    with suppress(KeyboardInterrupt):
        execute(run, "grid:stacked", on_round=interrupt)

    def broken(*args):
        raise RuntimeError("broken")

    monkeypatch.setattr("fedbn.stacked.fit.Stack", broken)
    outcome = execute(run, "grid:stacked", resume=partial[0])
    assert outcome.execution["train"] == ["stacked", "the stacked engine failed with RuntimeError"]

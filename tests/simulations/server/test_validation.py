"""Replies of clients are checked against their schemas before anything of them is used."""

from __future__ import annotations

import math
import tomllib
from contextlib import nullcontext
from dataclasses import dataclass

import pytest
import torch
from flwr.app import ArrayRecord, MetricRecord, RecordDict

from fedbn.errors import UserError
from fedbn.federation.metrics import STARTS
from fedbn.federation.server import Server, mean_loss
from fedbn.federation.setup import build_context
from fedbn.nn.schema import NO_LIMITS, TensorSpec
from fedbn.personalization.base import Personalization, personalizations
from fedbn.strategies.base import strategies
from fedbn.strategies.global_naive import GlobalNaive
from fedbn_clients.records import arrays
from fedbn_simulations.engines.execute import execute
from fedbn_simulations.flower.compat import task_identity
from fedbn_simulations.server.optimizer import server_step
from fedbn_simulations.server.safeguards import DEPLOYMENT_CONFIG, Safeguards
from fedbn_simulations.server.validation import InvalidReply, ReplyValidator
from tests.helpers import ROOT, same


@pytest.mark.parametrize(
    ("extra", "listed"),
    [("a", "a"), ("ab", "a, b"), ("cab", "a, b, c"), ("dcab", "a, b, c, ..."), ("edcab", "a, b, c, ...")],
)
def test_validator_lists_up_to_three_unexpected_names(extra, listed, small):
    validator = ReplyValidator(build_context(small("global-naive")))
    entries = {name: torch.zeros(spec.shape, dtype=spec.dtype) for name, spec in validator.schemas.entries.items()}
    assert validator.entries(3, arrays(entries), {}).keys() == entries.keys()
    with pytest.raises(InvalidReply, match=f"^client 3 sent unexpected or missing entries: {listed}; its reply"):
        validator.entries(3, arrays(entries | {name: torch.zeros(1) for name in extra}), {})


@dataclass(frozen=True)
class Chatty(GlobalNaive):
    """Sends a note that it does not declare, or declares."""

    name = "chatty"
    declares: bool = False

    def notes_schema(self, model, x):
        return {"greeting": TensorSpec(torch.float32, (2,))} if self.declares else {}

    def after_local_training(self, model):
        return {"greeting": torch.ones(2)}


@dataclass(frozen=True)
class ChattyMethod(Personalization):
    name = "chatty-method"

    def train(self, trainer):
        trainer.notes = {"greeting": torch.ones(2)}
        return super().train(trainer)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("chatty", "client . sent notes that chatty does not declare: greeting; its reply was discarded"),
        ("fedbn+chatty-method", r"client . sent notes that fedbn\+chatty-method does not declare: greeting"),
        ("chatty:declares=true", None),
    ],
)
def test_undeclared_notes_of_a_plug_in_are_rejected(text, message, small, monkeypatch):
    """So a run on the grid, as in the tests of all strategies and methods, fails for a plug-in without declaration."""
    monkeypatch.setitem(strategies(), Chatty.name, Chatty)
    monkeypatch.setitem(personalizations(), ChattyMethod.name, ChattyMethod)
    with nullcontext() if message is None else pytest.raises(InvalidReply, match=message):
        execute(small(text, rounds=1, model="mlp"), "grid")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"max_norm": -1.0}, r"max_norm must be a number of at least 0 \(0: no limit\), not -1.0"),
        ({"max_examples": math.nan}, "max_examples must be a number"),
        ({"max_statistic": "big"}, "max_statistic must be a number .* not 'big'"),
        ({"client_statistics": "yes"}, "client_statistics must be true or false, not 'yes'"),
    ],
)
def test_safeguards_reject_bad_options(config, message):
    with pytest.raises(UserError, match=message):
        Safeguards.from_config(config)


def test_run_config_of_flower_has_the_safeguards_of_deployments():
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["flwr"]["app"]["config"]
    assert {k: declared[k] for k in DEPLOYMENT_CONFIG} == DEPLOYMENT_CONFIG


def test_deployment_sends_no_client_statistics(small):
    run = small("global-naive", rounds=1, model="mlp")
    simulated, deployed = execute(run, "grid"), execute(run, "grid", deployed=True)
    unseen = build_context(run).population.unseen[0]
    columns = [{s.column for s in outcome.scores[unseen]} for outcome in (simulated, deployed)]
    assert columns[0] - columns[1] == set(STARTS)
    assert not columns[1] & set(STARTS)
    assert same(simulated.server.state, deployed.server.state)


def test_early_or_late_end_of_an_exchange_is_rejected(small):
    validator = ReplyValidator(build_context(small("global-recalibrated")))
    exchanges = validator.schemas.statistics_exchanges
    end = RecordDict({"moments": ArrayRecord()})
    assert validator.moments(3, end, exchanges, len(exchanges)) is None
    with pytest.raises(InvalidReply, match="client 3 sent unexpected or missing entries: features.1|m2"):
        validator.moments(3, end, exchanges, 0)
    more = RecordDict({"moments": arrays({k: torch.ones(s.shape, dtype=s.dtype) for k, s in exchanges[0].items()})})
    assert list(validator.moments(3, more, exchanges, 0)) == ["features.1"]
    with pytest.raises(InvalidReply, match="client 3 sent unexpected or missing entries"):
        validator.moments(3, more, exchanges, len(exchanges))


@pytest.mark.parametrize("strategy", ["global-naive", "global-recalibrated"])
def test_simulations_report_training_that_diverged(strategy, small):
    """Values of simulated clients are not checked, so that one strategy that diverges does not end a comparison."""
    run = small(strategy, rounds=1, model="mlp", lr=1e30)
    for engine in ("reference", "grid"):
        assert not math.isfinite(execute(run, engine).curve[-1].train_loss)


def test_largest_statistics_leave_the_server_finite(small):
    """Of valid values, pooled variances and the optimizer of the server square the largest ones."""
    ctx = build_context(small("global-pooled", model="mlp", server_optimizer="fedadam"))
    validator, server = ReplyValidator(ctx), Server(ctx.initial_server_state(), ctx.initial_server_state())
    metrics = MetricRecord({"num-examples": 10**12, "loss": 1e15})
    updates = []
    for user, sign in zip(ctx.trainers, (1, -1) * len(ctx.trainers)):
        bounds = {k: NO_LIMITS.range(spec.kind) for k, spec in validator.schemas.entries.items()}
        state = {k: torch.full_like(v, 0.999 * bounds[k][sign > 0]) for k, v in server.state.items()}
        updates.append(validator.update(user, RecordDict({"arrays": arrays(state), "metrics": metrics}), server.state))
    with task_identity(1):
        for number in (1, 2):
            server.advance(ctx, updates, number, server_step(ctx.run.plan))
    assert math.isfinite(mean_loss(updates))
    assert all(torch.isfinite(v).all() for v in (*server.state.values(), *server.memory.values()))


@pytest.mark.parametrize("loss", [math.nan, math.inf, 1e16, None, 3, "x"])
def test_losses_of_other_processes_are_finite_numbers(loss, small):
    ctx = build_context(small("global-naive", model="mlp"))
    validator, state, user = ReplyValidator(ctx), ctx.initial_server_state(), ctx.population.seen[0]

    def numbers(values):
        return MetricRecord({k: v for k, v in values.items() if isinstance(v, int | float)})

    update = RecordDict({"arrays": arrays(state), "metrics": numbers({"num-examples": 3, "loss": loss})})
    cell = {"n": 3, "accuracy": 0.5, "macro_f1": 0.5, "loss": loss}
    scores = RecordDict({"metrics": numbers({f"own|aggregated|{k}": v for k, v in cell.items()})})
    with pytest.raises(InvalidReply, match=f"client {user} reported the loss"):
        validator.update(user, update, state)
    with pytest.raises(InvalidReply, match=f"client {user} .*own.aggregated.loss"):
        validator.scores(user, scores, ["aggregated"], [], cold_starts=False)

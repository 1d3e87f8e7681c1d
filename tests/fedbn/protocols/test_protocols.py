"""Protocols: their settings are valid options, and deviations are named."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from fedbn.data.partition import parse_partition
from fedbn.protocols.base import protocol, protocols
from fedbn_simulations.cli.app import app
from fedbn_simulations.experiments.experiment import Experiment
from tests.fedbn.helpers import rejects


@pytest.mark.parametrize("name", protocols())
def test_protocol_determines_experiment(name):
    experiment = Experiment.from_dict({"protocol": name}).resolved()
    settings = protocol(name).settings
    assert experiment.protocol == name
    assert experiment.plan.rounds == settings.get("rounds", experiment.plan.rounds)
    assert experiment.partition == parse_partition(settings.get("partition", "natural"))
    assert experiment.deviations() == []
    assert Experiment.from_dict(experiment.to_dict()).resolved() == experiment
    assert "https://" in protocol(name).source
    assert all(": " in sentence for sentence in protocol(name).differs)


def test_pfllib_has_known_settings():
    full, part = (Experiment.from_dict({"protocol": text}) for text in ("pfllib-pat", "pfllib-dir:join=0.1"))
    assert full.partition == "pathological:classes=2:clients=20"
    assert (full.plan.clients_per_round, part.plan.clients_per_round) == (None, 2)
    assert (part.plan.rounds, part.plan.batch_size, part.plan.lr, part.plan.momentum) == (2000, 10, 0.005, 0)


def test_given_options_override_protocol_and_are_named():
    experiment = Experiment.from_dict({"protocol": "fedbn-digits", "rounds": 3, "plan": {"lr": 0.1}, "model": "mlp"})
    resolved = experiment.resolved()
    assert (resolved.plan.rounds, resolved.plan.lr, resolved.plan.batch_size, resolved.model) == (3, 0.1, 32, "mlp")
    (sentence,) = resolved.deviations()
    assert sentence.startswith("Deviates from protocol fedbn-digits: ")
    for part in ("model ('mlp', not 'digit-cnn')", "rounds (3, not 100)", "lr (0.1, not 0.01)"):
        assert part in sentence
    assert "batch_size" not in sentence
    assert "protocol" not in Experiment.from_dict({"scenario": "digits8"}).resolved().to_dict()


def test_protocol_refuses_bad_options():
    rejects("unknown protocol 'pfllib'", Experiment.from_dict, {"protocol": "pfllib"})
    rejects("fraction of clients per round", Experiment.from_dict, {"protocol": "pfllib-dir:join=0"})
    rejects("choose a concentration above 0", Experiment.from_dict, {"protocol": "fl-bench:alpha=0"})
    rejects("size=huge: choose small, medium, large", Experiment.from_dict, {"protocol": "leaf-femnist:size=huge"})
    rejects("choose digits or digits-five", Experiment.from_dict, {"protocol": "fedbn-digits:data=mnist"})


def test_list_shows_settings_and_source():
    shown = CliRunner().invoke(app, ["list", "protocols", "hbn"]).output
    assert "sets partition: dirichlet:alpha=0.6:clients=100" in shown
    assert "published: no number was verified in the source" in shown
    values = json.loads(CliRunner().invoke(app, ["list", "protocols", "hbn", "--json"]).output)
    assert values["settings"]["max_grad_norm"] == 10
    assert values["link"] == "https://arxiv.org/abs/2505.21877"

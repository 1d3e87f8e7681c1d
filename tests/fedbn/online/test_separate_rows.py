"""A user's answer does not depend on other users' rows, or the model is refused before work starts."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from fedbn import PersonalizedClassifier
from fedbn.errors import UserError
from fedbn.federation.setup import build_context
from fedbn.models import build
from fedbn.nn.roles import statistics_layers
from fedbn.online import personalize
from fedbn.strategies.base import strategies, strategy
from fedbn_simulations.adaptation.study import Study, run_study
from fedbn_simulations.service.users import UserStore

MIXES = r"layer '\d' \(BatchNorm\dd\) of Sequential mixes the windows of a batch"


def half_untracked(shape=(1, 8, 8), classes=10):
    norms = nn.BatchNorm2d(8, track_running_stats=False), nn.BatchNorm2d(8)
    layers = nn.Conv2d(shape[0], 8, 3), norms[0], nn.ReLU(), nn.Conv2d(8, 8, 3), norms[1], nn.ReLU()
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, classes))


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("call", ["predict", "calibrate"])
def test_bank_refuses_model_that_mixes_rows(rows, call):
    bank, x = personalize(half_untracked(), "pseudo"), torch.randn(rows, 1, 8, 8)
    with pytest.raises(UserError, match=f"rule 'pseudo' needs a model.*{MIXES}"):
        bank.predict(x, user="ann") if call == "predict" else bank.calibrate(x, user="ann")
    assert bank.users == []


def test_bank_checks_rows_after_windows_of_wrong_shape():
    bank = personalize(half_untracked())
    with pytest.raises(UserError, match="does not accept windows of shape"):
        bank.predict(torch.randn(2, 3, 8, 8), user="ann")
    with pytest.raises(UserError, match=MIXES):
        bank.predict(torch.randn(2, 1, 8, 8), user="ann")


@pytest.mark.parametrize("name", strategies())
def test_bank_computes_the_model_of_every_strategy_or_refuses_it(name):
    torch.manual_seed(0)
    model, x = strategy(name).prepare_model(build("small-cnn", (1, 8, 8), 10, 0)), torch.randn(9, 1, 8, 8) * 3 + 1
    if not statistics_layers(model):
        pytest.skip("no statistics")
    model.train()(x * 2)
    for layer in statistics_layers(model).values():
        layer.running_mean.uniform_(-1, 1)
        layer.running_var.uniform_(0.01, 0.1)
    model.eval()
    if name in ("dbn", "evalnorm", "iabn"):
        with pytest.raises(UserError, match=r"layer 'features.1' \(\w+\) also uses other values in evaluation"):
            personalize(model)
    else:
        bank = personalize(model, "source")
        together = bank(x, user=list("abcabcabc"))
        torch.testing.assert_close(together, model(x), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(bank(x[:1], user="a"), together[:1], rtol=1e-5, atol=1e-5)


def test_run_with_rule_refuses_and_other_runs_say_so(small, register_model):
    text = register_model(half_untracked)
    run = small("fedbn", model=text)
    assert any("layer '1' (BatchNorm2d) of the model mixes the windows" in n for n in build_context(run).notices)
    with pytest.raises(UserError, match=f"rule 'pseudo' needs a model.*{MIXES}"):
        build_context(replace(run, rule="pseudo"))
    with pytest.raises(UserError, match="rule 'pseudo' replaces the statistics of BN, but layer .*IABN"):
        build_context(replace(small("iabn"), rule="pseudo"))


@pytest.mark.parametrize(
    ("options", "message"), [({"model": ""}, MIXES), ({"strategies": ("iabn",)}, r"layer '\S+' \(IABN\) also uses")]
)
def test_study_refuses_before_training(register_model, tmp_path, options, message):
    if "model" in options:
        options = {"model": register_model(half_untracked)}
    study = Study.from_dict({"scenario": "digits8:users=3:unseen=1", "rules": ("pseudo",), "rounds": 1} | options)
    with pytest.raises(UserError, match=f"online adaptation .*{message}"):
        run_study(study, tmp_path)
    assert not list(tmp_path.iterdir())


def test_service_refuses_when_it_starts():
    with pytest.raises(UserError, match=MIXES):
        UserStore(half_untracked(), (1, 8, 8), [str(i) for i in range(10)])


def untracked_mlp(shape, classes):
    norms = nn.BatchNorm1d(6, track_running_stats=False), nn.BatchNorm1d(6)
    return nn.Sequential(nn.Linear(4, 6), norms[0], nn.Linear(6, 6), norms[1], nn.Linear(6, classes))


def test_classifier_refuses_in_fit(register_model):
    x = np.random.default_rng(0).normal(size=(40, 4))
    classifier = PersonalizedClassifier(model=register_model(untracked_mlp), rounds=1, random_state=0)
    with pytest.raises(UserError, match=f"PersonalizedClassifier needs a model.*{MIXES}"):
        classifier.fit(x, np.arange(40) % 2)
    with pytest.raises(UserError, match="PersonalizedClassifier with strategy 'dbn' replaces the statistics of BN"):
        PersonalizedClassifier(strategy="dbn", rounds=1, random_state=0).fit(x, np.arange(40) % 2)

"""Exported files of every strategy give the predictions of the run's own evaluation."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from fedbn.errors import UserError
from fedbn.federation.metrics import score
from fedbn.federation.run import Run
from fedbn.federation.setup import build_context
from fedbn.integrations.export import export
from fedbn.models import build
from fedbn.nn.conversion import convert
from fedbn.personalization.treatment import treatment
from fedbn.strategies.base import NormStrategy, strategies, strategy
from fedbn.tasks.classification import Classification
from fedbn_simulations.experiments.compare import compare
from fedbn_simulations.experiments.experiment import Experiment

OTHER_LAYERS = {
    "evalnorm", "feature-norm", "fedwon", "groupnorm", "iabn", "instancenorm", "layernorm", "nonorm", "weight-norm",
    "weight-standardization",
}  # fmt: skip
"""Strategies whose models compute with other layers in evaluation."""


def plain_network():
    return build("small-cnn", (1, 8, 8), 10, 0)


@pytest.fixture(scope="module")
def x():
    return torch.randn(12, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 + 1


def trained(model, x):
    """The model after some training, in evaluation mode."""
    optimizer = torch.optim.SGD(model.train().parameters(), 0.05)
    for step in range(4):
        optimizer.zero_grad()
        model(x * (1 + step)).square().mean().backward()
        optimizer.step()
    return model.eval().requires_grad_(False)


@pytest.mark.parametrize("name", strategies())
def test_weights_predict_the_same_in_the_plain_network_or_are_refused(name, x, tmp_path):
    model = trained(strategy(name).prepare_model(plain_network()), x)
    expected, path = model(x), tmp_path / "model.safetensors"
    if name in OTHER_LAYERS:
        with pytest.raises(UserError, match=r"without the layers that the strategy has put into SmallCNN.*\.pt2"):
            export(model, x, path, plain=plain_network())
        assert not path.exists()
    else:
        assert export(model, x, path, plain=plain_network()) < 1e-4
        plain = plain_network().eval()
        assert str(plain.load_state_dict(load_file(path))) == "<All keys matched successfully>"
        torch.testing.assert_close(plain(x), expected, rtol=1e-4, atol=1e-4)


CHANGED = [n for n, cls in strategies().items() if cls.prepare_model is not NormStrategy.prepare_model]
"""Strategies that change the network; the others export the same program as FedBN."""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fedbn", *CHANGED])
def test_program_contains_the_layers_of_every_strategy(name, x, tmp_path):
    model = trained(strategy(name).prepare_model(plain_network()), x)
    expected = model(x)
    assert export(model, x, tmp_path / "model.pt2") < 1e-5
    torch.testing.assert_close(torch.export.load(tmp_path / "model.pt2").module()(x), expected, rtol=1e-4, atol=1e-5)


def test_weights_of_layers_with_equal_names_are_refused(x, tmp_path):
    """All keys match, and yet the layers differ: another number of groups, or a normalized classifier."""
    group = nn.Sequential(nn.Conv2d(1, 8, 3), nn.GroupNorm(2, 8), nn.Flatten(), nn.Linear(288, 3))
    other = copy.deepcopy(group)
    other[1].num_groups = 4
    with pytest.raises(UserError, match="would not give the same predictions"):
        export(group, x, tmp_path / "m.safetensors", plain=other)
    linear = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 3))
    features = convert(copy.deepcopy(linear), "feature-norm")
    with pytest.raises(UserError, match="FeatureNormLinear"):
        export(features, x, tmp_path / "m.safetensors", plain=linear)
    assert not list(tmp_path.iterdir())


class Clipped(nn.BatchNorm2d):
    """BN that clips values that are rare."""

    def forward(self, x):
        return super().forward(x.clamp(-20, 20))


def test_layers_that_differ_only_far_from_the_example_are_refused(x, tmp_path):
    plain = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 3))
    nn.init.constant_(plain[0].weight, 0.3)
    model = copy.deepcopy(plain)
    model[1] = Clipped(4).eval()
    rows = 14 * x / x.abs().max()
    torch.testing.assert_close(model(rows), plain.eval()(rows))
    with pytest.raises(UserError, match="Clipped"):
        export(model, rows, tmp_path / "m.safetensors", plain=plain)


def test_model_that_mixes_rows_is_refused(x, tmp_path):
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4, track_running_stats=False), nn.Flatten())
    with pytest.raises(UserError, match=r"layer '1' \(BatchNorm2d\) of Sequential mixes the rows of a batch"):
        export(model, x, tmp_path / "m.pt2")


class Twice(nn.Module):
    """A convolution that runs twice, with two BN layers, which folding would merge into one weight."""

    def __init__(self):
        super().__init__()
        self.conv, self.first, self.second = nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1), nn.BatchNorm2d(1)

    def forward(self, x):
        return self.second(self.conv(self.first(self.conv(x)))).flatten(1)


def test_wrong_folding_is_found(x, tmp_path):
    model = trained(Twice(), x)
    with pytest.raises(UserError, match="would differ from the model.*export without folding"):
        export(model, x, tmp_path / "m.safetensors", fold=True)
    assert not list(tmp_path.iterdir())


STRATEGIES = (
    "fedbn",
    "iabn",
    "fednorm",
    "fedap",
    "hbn",
    "full-norm",
    "local",
    "fedbn+ditto",
    "silobn+apfl",
    "fedavg+fedrep",
)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    directory = tmp_path_factory.mktemp("export") / "results"
    values = {"scenario": "digits8:users=4:unseen=1", "strategies": STRATEGIES, "seeds": 1}
    values["plan"] = {"rounds": 2, "eval_every": 2, "global_test": 20}
    return compare(Experiment.from_dict(values).resolved(), directory, workers=1)


@pytest.mark.slow
@pytest.mark.xdist_group("export")
@pytest.mark.parametrize(
    ("name", "unseen"),
    [(name, False) for name in STRATEGIES] + [(n, True) for n in ("fedbn", "iabn", "fednorm", "fedap", "local")],
)
def test_cli_export_has_the_accuracy_of_the_run(directory, run_cli, tmp_path, name, unseen):
    runs = [json.loads(p.read_text()) for p in directory.glob("runs/*/result.json")]
    found = next(r for r in runs if r["run"]["strategy"] == str(treatment(name)))
    ctx = build_context(Run.from_dict(found["run"]))
    user = ctx.population.users[(ctx.population.unseen if unseen else ctx.population.seen)[-1]]
    path = tmp_path / ("model.pt2" if name == "iabn" else "model.safetensors")
    code, _, err = run_cli("export", directory, "--strategy", name, "--user", user.name, "--out", path)
    if name == "local" and unseen:
        assert code == 2
        assert "shares no model, so an unseen user has none: name a seen user" in err
        return
    assert code == 0, err
    plain = build(ctx.run.model, ctx.population.shape, len(ctx.population.classes), seed=7).eval()
    if name == "iabn":
        plain = torch.export.load(path).module()
    else:
        plain.load_state_dict(load_file(path))
    row = "unseen" if unseen else "own"
    line = next(e for e in found["evaluations"] if (e["user"], e["row"], e["column"]) == (user.name, row, "aggregated"))
    assert (
        score(Classification(), row, "aggregated", plain(user.test.x).detach(), user.test.y).metrics["accuracy"]
        == line["accuracy"]
    )


@pytest.mark.slow
@pytest.mark.xdist_group("export")
def test_cli_export_rejects_what_cannot_be_exported(directory, run_cli, tmp_path):
    for arguments, message in (
        (["iabn"], "would not give the same predictions without the layers"),
        (["local"], "shares no model, so an unseen user has none"),
        (["fednorm"], "has a model for each group of users: name a user with --user"),
        (["fedbn", "--fold"], "--fold changes the layers"),
        (["iabn", "--user", "user01", "--rule", "pseudo"], "also uses other values in evaluation"),
    ):
        code, _, err = run_cli("export", directory, "--out", tmp_path / "m.safetensors", "--strategy", *arguments)
        assert code == 2, arguments
        assert message in err
    assert not list(tmp_path.iterdir())

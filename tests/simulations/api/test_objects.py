"""Objects in the place of texts: the same results on all engines, and one sentence where they cannot be used."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import fedbn
from fedbn.errors import UserError
from fedbn.models import build
from fedbn.models.base import model_text
from fedbn.online.rules.base import Rule
from fedbn.online.rules.pseudo import Pseudo
from fedbn.strategies.base import NormStrategy
from fedbn.strategies.fedbn import FedBN
from fedbn.strategies.ownership import LOCAL
from fedbn.tasks import Regression
from fedbn.tta.tent import Tent
from fedbn_simulations.adaptation.methods import adaptation_method, adaptation_text
from fedbn_simulations.adaptation.study import families
from fedbn_simulations.engines.deployment import deploy, differences
from tests.helpers import PYTHONPATH, nonempty, same


@pytest.fixture(autouse=True)
def quick(tmp_path, monkeypatch, quick_reports):
    """Work in a temporary directory, with quick reports."""
    monkeypatch.chdir(tmp_path)


@dataclass(frozen=True)
class Mine(NormStrategy):
    name: ClassVar[str] = "mine"
    statistics = LOCAL
    alpha: float = 0.3


class Net(nn.Module):
    def __init__(self, shape, classes):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(shape[0], 8), nn.BatchNorm1d(8), nn.ReLU())
        self.head = nn.Linear(8, classes)

    def forward(self, x):
        return self.head(self.body(x))


def arrays():
    rng = np.random.default_rng(0)
    y = np.arange(96) % 3
    x = rng.normal(size=(96, 4)).astype(np.float32)
    x[np.arange(96), y] += 2
    return {"x": x, "y": y, "user": np.repeat(["ana", "bob", "cem"], 32)}


def population(seed=0):
    return fedbn.Population.from_arrays(**arrays())


PLAN = {"rounds": 2, "eval_every": 1, "batch_size": 8}
SMALL = PLAN | {"seeds": 1, "progress": False, "engine": "grid"}


def test_engines_agree_on_objects():
    def local_net(shape, classes):
        return Net(shape, classes)

    for model in (Net, local_net, Net((4,), 3)):
        reference, grid = (
            fedbn.federate(population(), Mine(alpha=0.5), model=model, engine=engine, **PLAN)
            for engine in ("reference", "grid")
        )
        assert reference.run.id == grid.run.id
        assert differences(reference.outcome, grid.outcome) == ()
        a, b = reference.outcome.client_states, grid.outcome.client_states
        assert nonempty(a)
        assert all(same(a[u], b[u]) for u in a)


def test_objects_equal_texts(tmp_path):
    np.savez(tmp_path / "mine.npz", **arrays())
    texts = {"data": f"files:path={tmp_path / 'mine.npz'}", "strategy": "fedbn", "rule": "pseudo:n0=8", "model": "mlp"}
    objects = {"data": population(), "strategy": FedBN(), "rule": Pseudo(n0=8.0), "model": "mlp"}
    first, second = (fedbn.federate(**inputs, seed=1, **PLAN) for inputs in (texts, objects))
    assert differences(first.outcome, second.outcome) == ()


def test_a_function_in_the_place_of_a_population():
    found = fedbn.federate(population, Mine, model=Net, **PLAN)
    home = __name__
    assert (found.run.scenario, found.run.strategy, found.run.model) == (
        f"{home}:population",
        f"{home}:Mine",
        f"{home}:Net",
    )
    assert differences(found.outcome, fedbn.federate(population(), Mine, model=Net, **PLAN).outcome) == ()


def pairs():
    """Training and test Dataset of each user, with real numbers as targets."""
    found = {}
    for name, x in zip(
        ("ana", "bob", "cem"), torch.randn(3, 24, 4, generator=torch.Generator().manual_seed(0)), strict=True
    ):
        found[name] = TensorDataset(x[:16], x[:16, 0]), TensorDataset(x[16:], x[16:, 0])
    return found


def test_datasets_in_the_place_of_a_population():
    expected = fedbn.Population.from_datasets(pairs(), task=Regression())
    results = [fedbn.federate(d, model=Net, task=Regression, **PLAN) for d in (expected, pairs(), pairs)]
    for result in results[1:]:
        assert differences(results[0].outcome, result.outcome) == ()
    assert results[0].run.id == results[1].run.id
    assert results[2].run.scenario == f"{__name__}:pairs"


def test_a_module_starts_every_run_with_its_weights():
    net = Net((4,), 3)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    runs = [fedbn.federate(population(), "fedavg", model=net, seed=seed, **PLAN | {"lr": 1e-12}) for seed in (0, 1)]
    for run in runs:
        assert torch.allclose(run.model().head.weight, before["head.weight"])
    assert same(net.state_dict(), before)
    text = model_text(net)
    nn.init.zeros_(net.head.weight)
    assert torch.equal(build(text, (4,), 3, 0).head.weight, before["head.weight"])
    assert fedbn.federate(population(), "fedavg", model=net, **PLAN).run.id != runs[0].run.id


def test_compare_accepts_one_strategy_and_a_list_of_seeds():
    found = fedbn.compare(population(), FedBN, model=Net, **SMALL | {"seeds": [2, 5]})
    assert found.strategies == ["fedbn"]
    assert found.meta["seeds"] == [2, 5]
    single = fedbn.federate(population(), "fedbn", model=Net, seed=5, **PLAN)
    lines = found.evaluations[found.evaluations["seed"] == 5]
    own = lines[(lines["row"] == "own") & (lines["column"] == "aggregated")].set_index("user")["accuracy"]
    scores = single.to_pandas().query("row == 'own' and column == 'aggregated'").set_index("user")["accuracy"]
    pd.testing.assert_series_equal(own, scores)


@pytest.mark.slow
def test_result_offers_plots(tmp_path):
    found = fedbn.compare(population(), ["fedavg", Mine(alpha=0.5)], model=Net, **SMALL)
    for plot, name in (
        (found.plot_matrix(), "m.png"),
        (found.plot_paired(), "p.svg"),
        (found.plot_convergence(), "c.pdf"),
    ):
        plot.save(tmp_path / name)
        assert (tmp_path / name).stat().st_size > 1000
        assert plot._repr_png_().startswith(b"\x89PNG")
    with pytest.raises(UserError, match=r"plots are saved as .png, .pdf, .svg, not as 'm.gif'"):
        found.plot_matrix().save("m.gif")
    single = fedbn.compare(population(), "fedavg", model=Net, **SMALL | {"rounds": 1})
    with pytest.raises(UserError, match=r"no strategy has differences to FedAvg \(naive BN\)"):
        single.plot_paired()
    with pytest.raises(UserError, match="one evaluated round makes no curve"):
        single.plot_convergence()


def test_result_offers_best_and_models():
    found = fedbn.compare(population(), ["fedavg", Mine(alpha=0.5)], model=Net, **SMALL)
    means = found.matrix().query("row == 'unseen' and column == 'recalibrated'").set_index("strategy")["mean"]
    assert means[found.best("unseen", "recalibrated")] == means.max()
    losses = found.matrix("loss").query("row == 'own' and column == 'aggregated'").set_index("strategy")["mean"]
    assert losses[found.best(metric="loss")] == losses.min()
    models = [found.model(Mine(alpha=0.5), user=user) for user in (None, "ana", "cem")]
    statistics = [model.body[1].running_mean for model in models]
    assert not torch.equal(statistics[1], statistics[2])  # seed 0 holds out bob
    assert torch.equal(models[1].head.weight, models[0].head.weight)
    for wrong, message in (
        ({"strategy": "silobn"}, "unknown strategy of this comparison 'silobn'"),
        ({"strategy": "fedavg", "seed": 7}, "unknown seed of this comparison '7'"),
        ({"strategy": "fedavg", "user": "dan"}, "unknown user 'dan'"),
    ):
        with pytest.raises(UserError, match=message):
            found.model(**wrong)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"data": 3}, "function that returns one, not a int"),
        ({"data": lambda: 3}, "is a int, not a fedbn.Population"),
        ({"data": lambda: 1 / 0}, "raises ZeroDivisionError: division by zero"),
        ({"strategies": [3]}, "strategy must be a text or a NormStrategy, not 3"),
        ({"strategies": [Mine, Mine()]}, "strategies given twice"),
        ({"model": 3}, "model must be a text, a factory or a torch.nn.Module, not 3"),
        ({"model": dict}, "model dict is not a subclass of torch.nn.Module"),
        ({"model": lambda shape, classes, width: 0}, "needs width: give defaults"),
        ({"model": lambda: 0}, "returned a int, not a torch.nn.Module"),
        ({"rule": 3}, "rule must be a text or a Rule, not 3"),
        ({"seeds": []}, "seeds must be different whole numbers from 0, at least one"),
        ({"seeds": [1, 1]}, "seeds must be different whole numbers"),
        ({"seeds": ["a"]}, "seeds"),
        ({"engine": "ray"}, "engine ray starts processes that import what a run needs, and memory:population"),
    ],
)
def test_compare_rejects_wrong_objects(call, message, tmp_path):
    inputs = {"data": population(), "strategies": "fedavg", "model": Net} | SMALL | call
    with pytest.raises(UserError) as caught:
        fedbn.compare(**inputs)
    assert message in str(caught.value)
    assert not list(tmp_path.rglob("result.json"))


def test_deploy_rejects_objects_in_memory():
    run = fedbn.federate(population(), "fedavg", model=Net, **PLAN).run
    with pytest.raises(UserError, match="a deployment starts processes"):
        deploy(run)


@dataclass(frozen=True, kw_only=True)
class MyRule(Rule):
    name: ClassVar[str] = "my-rule"
    speed: float = 0.5


@pytest.mark.parametrize(
    ("given", "text"),
    [
        (Tent(lr=0.25), "tent:lr=0.25"),
        (Tent, "tent"),
        (MyRule(speed=0.25), f"{__name__}:MyRule:speed=0.25"),
        (adaptation_method("pseudo:n0=8.0/adwin/decay:n=8"), "pseudo:n0=8.0/adwin/decay:n=8"),
    ],
)
def test_adaptation_text_names_objects(given, text):
    assert adaptation_text(given) == text
    assert adaptation_method(text).text == text


def test_adaptation_text_rejects_other_objects():
    with pytest.raises(UserError, match="rule or method must be a text or a Rule or Method, not 3"):
        adaptation_text(3)
    with pytest.raises(UserError, match="must be a subclass of Rule or Method"):
        adaptation_method(f"{__name__}:Mine")


def test_families_of_rules_with_references():
    texts = [f"{__name__}:MyRule", "pseudo", f"{__name__}:MyRule:speed=0.25", f"{__name__}:Mine"]
    assert families(texts) == [[texts[0], texts[2]]]


@pytest.mark.slow
def test_adapt_accepts_objects():
    found = fedbn.adapt(
        population(), Pseudo(n0=8.0), strategies="fedavg", model=Net, streams=["iid"], seeds=[3], rounds=1
    )
    assert set(found.to_pandas()["rule"]) >= {"source", "pseudo:n0=8.0"}


@pytest.mark.slow
def test_workers_agree_with_one_process():
    net = Net((4,), 3)

    def results(workers):
        found = fedbn.compare(
            population(), ["fedavg", Mine(alpha=0.5)], model=net, workers=workers, out=f"w{workers}", **SMALL
        )
        return found.evaluations.drop(columns="seed"), sorted(p.name for p in (found.directory / "runs").iterdir())

    (one, names), (two, others) = results(1), results(2)
    pd.testing.assert_frame_equal(one, two)
    assert names == others


SCRIPT = """
import numpy as np, torch, fedbn
from torch import nn
from fedbn.strategies.base import NormStrategy

class Mine(NormStrategy):
    name = "mine"

def net(shape, classes):
    return nn.Sequential(nn.Linear(shape[0], 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, classes))

rng = np.random.default_rng(0)
y = np.arange(96) % 3
people = fedbn.Population.from_arrays(rng.normal(size=(96, 4)), y, user=np.arange(96) // 32)
options = {"seeds": 1, "rounds": 1, "progress": False, "out": "out", "workers": WORKERS}
found = fedbn.compare(people, ["fedavg", Mine()], model=net, **options)
print(*sorted((p.parent.name, p.stat().st_mtime_ns) for p in found.directory.rglob("result.json")))
"""


def interactive(workers=1):
    """Run `SCRIPT` as in an interactive session, where ``__main__`` has no file."""
    return subprocess.run(
        [sys.executable, "-c", SCRIPT.replace("WORKERS", str(workers))],
        env=os.environ | {"PYTHONPATH": PYTHONPATH},
        capture_output=True,
        text=True,
    )


@pytest.mark.slow
def test_interactive_session_resumes_in_a_new_process(tmp_path):
    first, second = interactive(), interactive()
    assert "memory_Mine-" in first.stdout, first.stderr
    assert second.stdout == first.stdout  # the same runs, not computed again
    loaded = fedbn.load(tmp_path / "out")
    with pytest.raises(UserError, match="is an object that this process does not have: create the same object"):
        loaded.model("fedavg")
    (tmp_path / "out" / "comparison.json").unlink()
    for path in (tmp_path / "out" / "runs").glob("*/result.json"):
        path.unlink()
    parallel = interactive(workers=2)
    assert "worker processes cannot import what memory:" in parallel.stderr
    assert "it is defined in an interactive session" in parallel.stderr

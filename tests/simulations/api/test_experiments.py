"""``import fedbn`` is light and offers what it says; results show themselves and turn into tables."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from importlib.metadata import entry_points

import pandas as pd
import pytest
import torch
from torch import nn

import fedbn
from fedbn.errors import UserError
from fedbn_simulations.api import AdaptationResult
from tests.helpers import PYTHONPATH, ROOT, nonempty
from tests.simulations.results.test_comparison import write

HEAVY = {"torch", "numpy", "pandas", "scipy", "sklearn", "matplotlib", "flwr", "ray", "pyarrow", "jinja2"}


@pytest.fixture
def quick(tmp_path, monkeypatch, quick_reports):
    """Work in a temporary directory, with quick reports."""
    monkeypatch.chdir(tmp_path)


def python(*arguments):
    env = os.environ | {"PYTHONPATH": PYTHONPATH}
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=env)


def imported(script):
    """The top-level packages that a fresh interpreter has imported after a script."""
    code = "import sys\ntry:\n {}\nexcept SystemExit: pass\nprint('\\n'.join(sys.modules))"
    done = python("-c", code.format(script.replace("\n", "\n ")))
    done.check_returncode()
    return {line.partition(".")[0] for line in done.stdout.splitlines()}


def test_import_fedbn_imports_nothing_heavy():
    assert not imported("import fedbn") & HEAVY


def test_help_imports_nothing_heavy():
    found = imported("sys.argv = ['fedbn', '--help']\nfrom fedbn_simulations.cli import main\nmain()")
    assert "typer" in found
    assert not found & HEAVY


def test_adaptation_results_are_compared_by_identity(tmp_path):
    a, b = (AdaptationResult(pd.DataFrame({"users": [1, 2]}), pd.DataFrame(), tmp_path, "accuracy") for _ in range(2))
    assert a == a
    assert a != b
    assert len({a, b}) == 2


@pytest.mark.slow  # the import contract says the same of what is written; this of what happens
def test_library_does_not_import_flower():
    names = [name for name in fedbn.__all__ if name not in fedbn._ABOVE]
    found = imported(f"import fedbn\nfor name in {names}: getattr(fedbn, name)")
    assert "torch" in found
    assert not found & {"flwr", "ray", "fedbn_simulations", "fedbn_clients"}


def test_public_names_exist_and_are_typed():
    for name in fedbn.__all__:
        assert callable(getattr(fedbn, name)), name
    stub = ast.parse((ROOT / "fedbn" / "__init__.pyi").read_text())
    typed = {alias.asname for node in stub.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert typed == set(fedbn.__all__)
    assert (ROOT / "fedbn" / "py.typed").exists()
    assert set(fedbn.__all__) <= set(dir(fedbn))


def test_unknown_name_raises_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'compair'"):
        fedbn.compair  # noqa: B018


def test_missing_entry_point_names_the_fix(monkeypatch):
    monkeypatch.setattr(fedbn, "entry_points", lambda group: entry_points(group="nothing.of.this.name"))
    monkeypatch.delitem(vars(fedbn), "adapt", raising=False)
    with pytest.raises(ImportError, match=r"fedbn\.adapt needs the installed package: pip install"):
        fedbn.adapt  # noqa: B018


def test_python_m_fedbn_is_the_cli():
    done = python("-m", "fedbn", "list", "nonsense")
    assert done.returncode == 2
    assert "nonsense" in done.stderr


SMALL = {"strategies": ("global-naive", "fedbn"), "seeds": 1, "rounds": 1, "eval_every": 1, "progress": False}


@pytest.mark.slow
def test_compare_equals_the_command(quick):
    found = fedbn.compare("digits8", **SMALL)
    assert found.strategies == ["global-naive", "fedbn"]
    assert (found.directory / "comparison.json").exists()
    before = nonempty(p.stat().st_mtime_ns for p in found.directory.rglob("result.json"))
    again = fedbn.compare("digits8", **SMALL)  # found, not done again
    assert again.directory == found.directory
    assert [p.stat().st_mtime_ns for p in again.directory.rglob("result.json")] == before
    pd.testing.assert_frame_equal(again.to_pandas(), found.to_pandas())
    other = fedbn.compare("digits8", **SMALL | {"rounds": 2})
    assert other.directory != found.directory


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"strategies": ("fedbm",)}, "Did you mean 'fedbn'"),
        ({"roundz": 3}, "Did you mean 'rounds'"),
        ({"seeds": 0}, "at least 1"),
        ({"track": ["tensorbord:x"]}, "Did you mean 'tensorboard'"),
    ],
)
def test_compare_rejects_bad_options_early(quick, tmp_path, wrong, message):
    with pytest.raises(UserError, match=message):
        fedbn.compare("digits8", **SMALL | wrong)
    assert not list(tmp_path.rglob("result.json"))


def test_comparison_has_repr_and_html(quick, tmp_path):
    hostile = "<script>x</script>"
    found = fedbn.load(write(tmp_path, {"global": 0.8, hostile: 0.9}))
    assert repr(found).startswith("Own test: ")
    assert "unseen users" in repr(found)
    shown = found._repr_html_()
    assert "<table" in shown
    assert "[95 % interval over users]" in shown
    assert hostile not in shown
    assert set(found.to_pandas("loss")["strategy"]) == {"global", hostile}


def test_audit_has_repr_and_html():
    net = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))
    found = fedbn.audit(net, "silobn", shape=(4,))
    assert repr(found).splitlines()[0].startswith("Sequential with silobn: 148 bytes, 116 down")
    assert "fix: " in repr(found)
    assert "<table" in found._repr_html_()
    assert found.to_pandas().loc["1.running_mean", "owner"] == "local"
    with pytest.raises(UserError, match="Did you mean 'silobn'"):
        fedbn.audit(net, "silobm")


def test_users_have_repr_and_html():
    net = fedbn.personalize(nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 3)), "pseudo:n0=8")
    assert "0 users, 0 in memory" in repr(net)
    net(torch.ones(3, 2), user=["ann", "<b>bob", "ann"])
    assert net.to_pandas()["learned"].to_dict() == {"<b>bob": 1.0, "ann": 2.0}
    assert "2 users, 2 in memory" in repr(net)
    assert "<b>bob" not in net._repr_html_()
    with pytest.raises(UserError, match="Did you mean 'pseudo'"):
        fedbn.personalize(net.model, "pseudi")


@pytest.mark.slow
def test_adapt_equals_the_command(quick):
    found = fedbn.adapt("digits8", ["pseudo:n0=8"], streams=["iid"], seeds=1, rounds=1)
    assert "pseudo:n0=8" in repr(found)
    assert "<table" in found._repr_html_()
    assert set(found.to_pandas()["rule"]) >= {"source", "pseudo:n0=8.0"}
    assert not found.users.empty

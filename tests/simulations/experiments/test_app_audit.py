"""The audit of an app measures its messages and finds mistakes that are visible only while it runs."""

from __future__ import annotations

import shutil

import pytest

from fedbn_simulations.experiments.app_audit import audit_app
from fedbn_simulations.flower.apps import FlowerApp
from tests.helpers import ROOT

APPS = ROOT / "tests" / "apps"

DP = "DifferentialPrivacyServerSideFixedClipping"


def copy_app(tmp_path, file, *replacements):
    """A copy of the app with messages, with texts replaced in one of its files."""
    shutil.copytree(APPS / "messages", tmp_path / "app")
    path = tmp_path / "app" / "messages" / f"{file}.py"
    for old, new in replacements:
        assert old in path.read_text()
        path.write_text(path.read_text().replace(old, new))
    return FlowerApp.read(tmp_path / "app")


def found_by(audit):
    return {f.lint: f for f in audit.findings}


def test_audit_app_measures_traffic_by_role_and_finds_averaged_counters():
    audit = audit_app(FlowerApp.read(APPS / "messages"))
    rows = {row["role"]: row for row in audit.traffic}
    assert rows["statistics"] == {"role": "statistics", "entries": 2, "bytes_down": 64, "bytes_up": 64}
    assert rows["body"]["bytes_up"] == 4 * 2 * 8 * 3
    assert audit.strategies == ("FedAvg",)
    found = found_by(audit)
    assert found["averaged-counters"].where == ("norm.num_batches_tracked",)
    assert "int64 and float64" in found["averaged-counters"].message
    assert "name-misses" in found
    assert not {"statistics-under-dp", "evaluates-in-training-mode", "client-errors", "untrained"} & set(found)


def test_audit_app_leaves_no_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    audit_app(FlowerApp.read(APPS / "messages"), run_config=("out='final_model.pt'",))
    assert not list(tmp_path.iterdir())


def test_audit_app_finds_statistics_under_dp(tmp_path):
    app = copy_app(
        tmp_path,
        "server_app",
        ("import FedAvg\n", f"import FedAvg, {DP}\n"),
        ("    result = strategy", f"    strategy = {DP}(strategy, 0.1, 1.0, 2)\n    result = strategy"),
    )
    audit = audit_app(app)
    assert audit.strategies == (DP, "FedAvg")
    assert found_by(audit)["statistics-under-dp"].where == ("norm.running_mean", "norm.running_var")


def test_audit_app_finds_evaluation_in_training_mode(tmp_path):
    found = found_by(audit_app(copy_app(tmp_path, "task", ("    net.eval()\n", ""))))
    assert found["evaluates-in-training-mode"].where == ("BatchNorm1d",)


def test_audit_app_finds_errors_of_clients(tmp_path):
    app = copy_app(tmp_path, "client_app", ("    loss = train_fn", "    1 / 0\n    loss = train_fn"))
    assert "ZeroDivisionError: division by zero" in found_by(audit_app(app))["client-errors"].message


def test_audit_command_of_an_app_that_fails_ends_like_a_run(tmp_path, run_cli, caplog):
    app = copy_app(tmp_path, "server_app", ("    config = ", '    raise RuntimeError("no disk")\n    config = '))
    assert run_cli("audit", "--app", app.directory)[0] == 1
    assert "Simulation raised an exception" in caplog.text
    assert "no disk" in caplog.text


def test_audit_command_prints_traffic_and_findings_of_an_app(run_cli):
    model = ("--model-fn", "numpyclient.task:make_net")
    code, out, err = run_cli("audit", "--app", APPS / "numpy_client", *model)
    assert code == 0, err
    assert "server with no strategy of flwr.serverapp" in " ".join(out.split())
    assert "statistics" in out
    findings = out[out.index("warning") :].splitlines()
    padding = max(len(line) - len(line.rstrip()) for line in findings)
    assert padding < 80  # a redirected console is very wide


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ((), "name a model, or the directory of a Flower app with --app"),
        (("mlp", "--app", APPS / "messages"), "give neither a model nor a strategy"),
        (("--app", APPS / "sklearn"), "give --model-fn package.module:Net"),
    ],
)
def test_audit_command_rejects_bad_arguments(arguments, text, run_cli):
    code, _, err = run_cli("audit", *arguments)
    assert code == 2
    assert text in err

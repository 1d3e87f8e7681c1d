"""Every option is reachable from the command line, the Python API, run files and Flower's run config."""

from __future__ import annotations

import dataclasses
import tomllib
import typing
from itertools import pairwise

import pytest
import tomli_w
import typer
from click import testing
from typer.testing import CliRunner

import fedbn
from fedbn.config import PLAN_FIELDS, Conditions, Plan, RunOptions, nest, option
from fedbn.errors import UserError
from fedbn.federation.run import plan_for
from fedbn.scenarios.base import scenarios
from fedbn_clients.config import run_from_config
from fedbn_simulations.adaptation.options import StudyOptions
from fedbn_simulations.adaptation.study import Study
from fedbn_simulations.cli.app import app
from fedbn_simulations.cli.options import options_of
from fedbn_simulations.experiments.experiment import Experiment
from fedbn_simulations.experiments.options import ExperimentOptions
from tests.commands import command_line
from tests.helpers import ROOT

# A value other than the default for every option, as text of the command line and as a value.
VALUES = {
    "scenario": ("digits8:images=600", "digits8:images=600"),
    "model": ("mlp", "mlp"),
    "task": ("classification:smoothing=0.1", "classification:smoothing=0.1"),
    "metric": ("macro_f1", "macro_f1"),
    "partition": ("dirichlet:alpha=0.25:clients=4", "dirichlet:alpha=0.25:clients=4"),
    "shift": ("gain", "gain"),
    "device": ("cpu:0", "cpu:0"),
    "head": ("layer4,fc", "layer4,fc"),
    "private": ("fc", "fc"),
    "privacy": ("clip=1.0", "clip=1.0"),
    "strategy": ("silobn", "silobn"),
    "seed": ("3", 3),
    "validation": ("", True),
    "rule": ("ema", "ema"),
    "strategies": ("fedbn,silobn", ("fedbn", "silobn")),
    "seeds": ("5", 5),
    "halvings": ("2", 2),
    "protocol": ("fedbn-digits", "fedbn-digits"),
    "rates": ("fedbn=0.5", {"fedbn": 0.5}),
    "rules": ("source,ema", ("source", "ema")),
    "align": ("rotation", ("rotation",)),
    "check": ("held-out", "held-out"),
    "check_rules": ("", True),
    "augments": ("jitter,rotate", ("jitter", "rotate")),
    "streams": ("iid", ("iid",)),
    "starts": ("recording", ("recording",)),
    "rounds": ("7", 7),
    "patience": ("4", 4),
    "min_delta": ("0.5", 0.5),
    "clients_per_round": ("2", 2),
    "local_epochs": ("4", 4),
    "batch_size": ("17", 17),
    "lr": ("0.25", 0.25),
    "schedule": ("step:every=5", "step:every=5"),
    "optimizer": ("adamw:weight_decay=0.1", "adamw:weight_decay=0.1"),
    "warmup": ("2", 2),
    "max_grad_norm": ("1.5", 1.5),
    "augment": ("flip+jitter:scale=0.1", "flip+jitter:scale=0.1"),
    "momentum": ("0.5", 0.5),
    "weight_decay": ("0.125", 0.125),
    "optimizer_state": ("keep", "keep"),
    "weighting": ("uniform", "uniform"),
    "proximal": ("0.5", 0.5),
    "server_optimizer": ("fedadam", "fedadam"),
    "server_lr": ("0.5", 0.5),
    "eval_every": ("3", 3),
    "global_test": ("60", 60),
    "online_prior": ("8.0", 8.0),
    "tolerate": ("0.5", 0.5),
    "user_batches": ("", True),
    "precision": ("bfloat16", "bfloat16"),
}

TOGETHER = [name for name in PLAN_FIELDS if name != "weight_decay"]
"""Options of the plan that can be set together. Only sgd uses this one."""


def names(kind):
    return [f.name for f in dataclasses.fields(kind) if f.name not in ("plan", "tune")]


class Stop(Exception):
    pass


@pytest.fixture
def captured(monkeypatch):
    """Calls of what commands would run, stopped before any work."""
    calls = []

    def stop(first, *args, **kwargs):
        calls.append(first)
        raise Stop

    for target in (
        "fedbn_simulations.api.experiments.run_comparison",  # first: its import needs the others
        "fedbn_simulations.api.experiments.run_study",
        "fedbn_simulations.experiments.compare.compare",
        "fedbn_simulations.adaptation.study.run_study",
        "fedbn_simulations.engines.deployment.deploy",
        "fedbn_simulations.leakage.states.state_leaks",
    ):
        monkeypatch.setattr(target, stop)
    monkeypatch.chdir(ROOT)
    return calls


def read(value, name):
    return getattr(value.plan if name in PLAN_FIELDS else value, name)


def flags(name):
    text = VALUES[name][0]
    return [f"--{name.replace('_', '-')}", *([text] if text else [])]


def invoke(captured, arguments):
    result = testing.CliRunner().invoke(command_line(), arguments)
    assert isinstance(result.exception, Stop), (result.output, result.exception)
    return captured.pop()


COMMANDS = {
    "compare": (ExperimentOptions, ["--out", "build/none"]),
    "adapt": (StudyOptions, []),
    "deploy": (RunOptions, []),
    "leakage": (RunOptions, ["--states"]),
}
EVERY = [
    (command, name)
    for command, (kind, _) in COMMANDS.items()
    for name in [*names(kind), *PLAN_FIELDS]
    if not (command == "leakage" and name in ("privacy", "rule", "validation"))
]


@pytest.mark.parametrize(("command", "name"), EVERY)
def test_command_sets_every_field(command, name, captured):
    _, more = COMMANDS[command]
    scenario = VALUES["scenario"][0] if name == "scenario" else "digits8"
    arguments = [command, scenario, *more, *(flags(name) if name != "scenario" else [])]
    if name == "rates":
        arguments += ["--strategies", "fedbn"]
    if name == "halvings":
        arguments += ["--tune", "lr=0.1,0.2,0.3,0.4"]
    assert read(invoke(captured, arguments), name) == VALUES[name][1]


@pytest.mark.parametrize(
    ("function", "name"),
    [("compare", name) for name in (*names(ExperimentOptions), *PLAN_FIELDS)]
    + [("adapt", name) for name in (*names(StudyOptions), *PLAN_FIELDS)],
)
def test_function_accepts_every_field(function, name, captured, tmp_path):
    given = {"compare": {"strategies": ("fedbn",), "progress": False}, "adapt": {}}[function]
    options = {"scenario": "digits8", **given, name: VALUES[name][1]}
    if name == "halvings":
        options["tune"] = {"lr": (0.1, 0.2, 0.3, 0.4)}
    with pytest.raises(Stop):
        getattr(fedbn, function)(options.pop("scenario"), **options, out=tmp_path)
    assert read(captured.pop(), name) == VALUES[name][1]


@pytest.mark.parametrize(("command", "kind"), [("compare", ExperimentOptions), ("adapt", StudyOptions)])
def test_run_file_sets_every_field(command, kind, captured, tmp_path):
    values = {name: VALUES[name][1] for name in names(kind)} | {"strategies": ["fedbn"]}
    values["plan"] = {name: VALUES[name][1] for name in TOGETHER}
    if "halvings" in values:
        values["tune"] = {"lr": [0.1, 0.2, 0.3, 0.4]}
    (tmp_path / "run.toml").write_text(tomli_w.dumps(values))
    found = invoke(captured, [command, "--run-file", str(tmp_path / "run.toml")])
    for name in {*names(kind), *TOGETHER} - {"strategies"}:
        assert read(found, name) == VALUES[name][1], name


def test_flower_run_config_sets_every_field():
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["flwr"]["app"]["config"]
    config = dict(declared)
    for name in names(RunOptions):
        assert type(declared[name]) is type(VALUES[name][1]), name
        config[name] = VALUES[name][1]
    config["plan"] = ",".join(f"{name}={VALUES[name][1]}" for name in TOGETHER)
    run = run_from_config(config)
    for name in [*names(RunOptions), *TOGETHER]:
        assert read(run, name) == VALUES[name][1], name


def test_options_have_help_and_differ_from_test_values():
    set_by_scenarios = {name for s in scenarios().values() for name in s.plan}
    for kind in (ExperimentOptions, StudyOptions, RunOptions, Plan):
        for f in dataclasses.fields(kind):
            if f.name in VALUES:
                assert f.default != VALUES[f.name][1]
            if f.name == "plan":
                continue
            assert f.metadata["help"].endswith("."), f.name
            if kind is Plan:
                assert f.metadata["by_scenario"] or f.name not in set_by_scenarios, f.name


def test_help_shows_panels_and_defaults():
    text = CliRunner().invoke(app, ["compare", "--help"], terminal_width=80).output
    found = [text.index(f"─ {panel} ─") for panel in ("Data", "Federation", "Optimization", "Evaluation", "Output")]
    assert found == sorted(found)
    assert "[default: the scenario's]" in text
    assert "[default: natural]" in text
    assert text.count("none]") == 1  # the server optimizer's name is none


@pytest.mark.slow  # renders the help of every command
def test_help_fits_80_columns():
    for command in typer.main.get_command(app).commands:
        text = CliRunner().invoke(app, [command, "--help"], terminal_width=80).output
        assert max(map(len, text.splitlines())) <= 80, command
        assert "…" not in text, command
        # Paragraphs are filled up to the width, and not broken where the docstring is.
        prose = text[text.index("Usage") : text.index("╭")].splitlines()
        pairs = [(a.strip(), b.strip()) for a, b in pairwise(prose) if a.strip() and b.strip()]
        assert all(len(a) + 1 + len(b.split()[0]) > 78 for a, b in pairs), command


def test_options_have_the_names_of_flower(captured):
    found = invoke(captured, ["compare", "digits8", "--strategy", "fedbn", "--num-rounds", "7"])
    assert (found.strategies, found.plan.rounds) == (("fedbn",), 7)


def test_flat_options_override_a_plan_table():
    values = nest(ExperimentOptions, {"scenario": "hapt", "plan": {"rounds": 2, "lr": 0.1}, "rounds": 5})
    assert values == {"scenario": "hapt", "plan": {"rounds": 5, "lr": 0.1}}


@pytest.mark.parametrize("kind", [Experiment, Study])
def test_from_dict_rejects_bad_options(kind):
    with pytest.raises(UserError, match="unknown option 'round'. Did you mean 'rounds'"):
        kind.from_dict({"scenario": "digits8", "round": 3})
    with pytest.raises(UserError, match="option of plan 'round'|unknown option of plan"):
        kind.from_dict({"scenario": "digits8", "plan": {"round": 3}})
    with pytest.raises(UserError, match="plan must be a table"):
        kind.from_dict({"scenario": "digits8", "plan": 3, "rounds": 3})
    with pytest.raises(UserError, match="no scenario given"):
        kind.from_dict({"rounds": 3})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Plan(lr=0.0), "lr must be positive, not 0"),
        (lambda: Plan(lr=float("nan")), "lr must be positive"),
        (lambda: Plan(momentum=1.0), "momentum must be below 1, not 1"),
        (lambda: Plan(rounds=0), "rounds must be at least 1, not 0"),
        (lambda: ExperimentOptions("digits8", seeds=0), "seeds must be at least 1, not 0"),
    ],
)
def test_checked_rejects_values_out_of_bounds(make, message):
    with pytest.raises(UserError, match=message):
        make()


def test_data_and_columns_name_a_scenario(captured, tmp_path):
    path = tmp_path / "mine.csv"
    path.write_text("a,b,user,y\n" + "".join(f"{i},{i % 3},{i % 4},{i % 2}\n" for i in range(80)))
    arguments = ["--data", str(path), "--columns", "x=a+b:test=0.3", "--model", "mlp"]
    for command, (_, more) in COMMANDS.items():
        found = invoke(captured, [command, *more, *arguments])
        assert found.scenario == f"files:path={path}:x=a+b:test=0.3", command
    for wrong, message in (
        (["compare", "digits8", "--data", str(path)], "give a scenario or --data, not both"),
        (["adapt", "digits8", "--columns", "x=a"], "--columns goes with --data"),
    ):
        result = testing.CliRunner().invoke(command_line(), wrong)
        assert isinstance(result.exception, UserError)
        assert message in str(result.exception)


def test_options_of_leaves_own_parameters_to_the_command():
    @options_of(Conditions)
    def command(
        options: dict[str, typing.Any],
        scenario: typing.Annotated[str | None, typer.Argument()] = None,
        model: typing.Annotated[str, typer.Option()] = "mlp",
    ) -> None:
        seen.append((model, options))

    seen: list[object] = []
    absent = dict.fromkeys(("scenario", "data", "columns", "task", "partition", "device", "privacy", "head", "private"))
    command(**absent, model="resnet20", shift="gain")
    assert seen == [("resnet20", {"shift": "gain"})]


def test_option_copies_mutable_defaults():
    @dataclasses.dataclass
    class Two:
        table: dict = option({}, "A table.")

    first = Two()
    first.table["a"] = 1
    assert Two().table == {}


def test_plan_for_starts_from_the_scenario():
    assert plan_for("hapt").lr == scenarios()["hapt"].plan["lr"]
    assert plan_for("hapt", lr=0.5).lr == 0.5

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass

import pytest

from fedbn.augment.base import augmentations
from fedbn.config import Plan
from fedbn.data.partition import partitions
from fedbn.federation.run import Run, plan_for
from fedbn.online.alignments.base import alignments
from fedbn.online.rules.base import rules
from fedbn.optim.base import optimizers
from fedbn.optim.schedules import schedules
from fedbn.personalization.base import personalizations
from fedbn.plugins import parse, render, spellings
from fedbn.privacy.mechanism import Privacy
from fedbn.protocols.base import protocols
from fedbn.scenarios.base import scenario, scenarios
from fedbn.strategies.base import strategies, strategy
from fedbn.streams.base import streams
from fedbn.tta.base import methods
from tests.fedbn.helpers import rejects
from tests.helpers import ROOT

PLUGINS = {
    "strategies": strategies,
    "personalizations": personalizations,
    "rules": rules,
    "methods": methods,
    "alignments": alignments,
    "streams": streams,
    "partitions": partitions,
    "protocols": protocols,
    "scenarios": scenarios,
    "optimizers": optimizers,
    "schedules": schedules,
    "augmentations": augmentations,
    "settings": lambda: {"plan": Plan, "privacy": Privacy, "run": Run},
}


@pytest.mark.parametrize("kind", PLUGINS)
def test_defaults_are_those_of_stored_results(kind):
    """A text such as ``groupnorm`` identifies stored results, so its defaults must not change silently.

    Add new options to the file. If a default has to change, raise `NUMERICS` too.
    """
    stored = json.loads((ROOT / "tests/golden/defaults.json").read_text(encoding="utf-8"))[kind]
    current = {
        name: {f.name: repr(f.default) for f in dataclasses.fields(cls) if f.default is not dataclasses.MISSING}
        for name, cls in PLUGINS[kind]().items()
    }
    for name, options in stored.items():
        assert {option: current[name].get(option) for option in options} == options, name


@pytest.mark.parametrize("name", strategies())
def test_render_and_parse_are_inverses(name):
    assert render(strategy(name)) == name
    assert strategy(render(strategy(name))) == strategy(name)


def test_parse_allows_colons_in_values():
    parsed = scenario("files:path=/a:b.csv:x=imu:acc_x+imu:acc_y:y=y")
    assert (parsed.path, parsed.x, parsed.y) == ("/a:b.csv", "imu:acc_x+imu:acc_y", "y")
    assert scenario(render(parsed)) == parsed
    rejects("write options as files:field=value, not 'a.csv'", scenario, "files:a.csv:x=b")


def test_render_omits_default_options():
    assert render(strategy("groupnorm:groups=4:channels=2")) == "groupnorm:groups=4:channels=2"
    assert render(strategy("groupnorm:groups=8:channels=none")) == "groupnorm"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("fedbm", r"unknown strategy 'fedbm'. Did you mean 'fedbn'\?"),
        ("groupnorm:group=4", r"unknown option of strategy 'groupnorm' 'group'. Did you mean 'groups'\?"),
        ("groupnorm:groups=four", r"option 'groups' must be int, not 'four'"),
        ("groupnorm:groups", r"write options as groupnorm:field=value, not 'groups'"),
        ("groupnorm:groups=none", r"option 'groups' cannot be none"),
        ("mtfl:private=bn", r"unknown value for strategy 'mtfl', option 'private' 'bn'"),
        ("silobn:x=1", r"strategy 'silobn' has no options, so 'x' cannot be set"),
    ],
)
def test_strategy_rejects_bad_input(text, message):
    rejects(message, strategy, text)


@dataclass(frozen=True)
class One:
    name = "one-way"
    aliases = ("uno",)


@dataclass(frozen=True)
class Two(One):
    name = "two"


@pytest.mark.parametrize(("text", "cls"), [("uno", One), ("UNO", One), ("OneWay", One), ("one_way", One), ("Two", Two)])
def test_parse_finds_aliases_and_spellings(text, cls):
    assert type(parse(text, "plug-in", {"one-way": One, "two": Two})) is cls


def test_names_take_precedence_over_aliases():
    assert type(parse("uno", "plug-in", {"one-way": One, "uno": Two})) is Two


def test_unknown_name_suggests_alias():
    rejects("unknown plug-in 'unoo'. Did you mean 'uno'", parse, "unoo", "plug-in", {"one-way": One})


def test_discovery_rejects_shared_alias():
    other = type("Other", (), {"name": "other", "aliases": ("Uno",)})
    rejects("'one-way' and 'other' share the alias 'uno'", spellings, {"one-way": One, "other": other})


def test_scenario_suggests_similar_name():
    rejects(r"unknown scenario 'hapd'. Did you mean 'hapt'\?", scenario, "hapd")
    assert "digits8" in scenarios()


def test_run_survives_json():
    run = Run("digits8", "groupnorm:groups=2", 3, plan=Plan(rounds=4))
    assert Run.from_dict(__import__("json").loads(run.to_json())) == run
    assert run.id != Run("digits8", "groupnorm:groups=2", 4, plan=Plan(rounds=4)).id


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rounds": 0}, "rounds must be at least 1, not 0"),
        ({"lr": 0.0}, "lr must be positive"),
        ({"lr": float("nan")}, "lr must be positive"),
        ({"momentum": 1.0}, "momentum must be below 1"),
        ({"clients_per_round": 0}, "clients_per_round must be at least 1"),
        ({"weighting": "size"}, "unknown value for plan, option 'weighting' 'size'"),
        ({"round": 3}, r"unknown option of plan 'round'. Did you mean 'rounds'\?"),
    ],
)
def test_plan_rejects_bad_input(settings, message):
    rejects(message, plan_for, "digits8", **settings)

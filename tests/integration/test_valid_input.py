"""Valid external input is accepted with the values that were written."""

from __future__ import annotations

import json
import math
import typing
from dataclasses import MISSING, fields, replace
from types import NoneType

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedbn.config import Plan
from fedbn.data.partition import parse_partition, partitions
from fedbn.data.shift import parse_shift, shifts
from fedbn.federation.metrics import Score
from fedbn.federation.run import Run, plan_for
from fedbn.federation.server import ClientFailure, Outcome, RoundMetrics, Server
from fedbn.federation.setup import build_context
from fedbn.online.rules.base import rule, rules
from fedbn.personalization.base import personalizations
from fedbn.personalization.treatment import treatment
from fedbn.plugins import parse, render
from fedbn.privacy.mechanism import Privacy, parse_privacy, render_privacy
from fedbn.scenarios.base import scenario, scenarios
from fedbn.strategies.base import strategies, strategy
from fedbn.streams import streams
from fedbn_clients.config import run_from_config
from fedbn_clients.records import arrays
from fedbn_clients.serialization import pack, unpack
from fedbn_simulations.engines.execute import parse_engine
from fedbn_simulations.experiments.experiment import Experiment, read_run_file
from fedbn_simulations.server.validation import ReplyValidator
from fedbn_simulations.storage.checkpoint import load_outcome, save_outcome
from tests.helpers import same

CASES = settings(max_examples=20, deadline=None)


REFUSED = {("population", "n0")}
"""Options that a plug-in inherits but refuses."""


BOOLEANS = {True: ("true", "True", "1", "yes"), False: ("false", "False", "0", "no")}


def value_of(hint, default):
    """Valid values near the default."""
    if default is None or NoneType in typing.get_args(hint):
        kind = next(o for o in typing.get_args(hint) if o is not NoneType)
        return st.none() | value_of(kind, default or 3)
    if typing.get_origin(hint) is typing.Literal:
        return st.sampled_from(typing.get_args(hint))
    if typing.get_origin(hint) is tuple:
        return st.lists(value_of(typing.get_args(hint)[0], 1), min_size=1, max_size=3).map(tuple)
    if hint is bool:
        return st.booleans()
    if hint is int:
        return st.integers(default, default + 4)
    if hint is float:
        return st.floats(default / 2, default) if 0 < default < math.inf else st.floats(0.5, 1)
    return st.just(default)


def valid(cls):
    """Values of some of a plug-in's options, by name."""
    hints = typing.get_type_hints(cls)
    known = [f for f in fields(cls) if f.init and f.default is not MISSING and (cls.name, f.name) not in REFUSED]
    options = {f.name: value_of(hints[f.name], f.default) for f in known}
    return st.fixed_dictionaries({}, optional=options)


def written(value):
    return "+".join(map(str, value)) if isinstance(value, tuple) else str(value)


def text_of(cls):
    """Texts such as ``name:field=value``, with the class and the values."""
    options = valid(cls).flatmap(lambda values: st.permutations(list(values.items())))
    return options.map(lambda o: (":".join([cls.name, *(f"{k.rstrip('_')}={written(v)}" for k, v in o)]), cls, dict(o)))


def plugin_texts(known):
    """`text_of` one of several classes."""
    return st.sampled_from([known[name] for name in sorted(known)]).flatmap(text_of)


def parse_stream(text):
    return parse(text, "stream", streams())


PARSERS = {
    "strategy": (strategy, strategies()),
    "partition": (lambda text: parse(parse_partition(text), "partition", partitions()), partitions()),
    "shift": (lambda text: parse(parse_shift(text), "shift", shifts()), shifts()),
    "rule": (rule, rules()),
    "stream": (parse_stream, streams()),
    "scenario": (scenario, scenarios()),
    "method": (lambda text: treatment(f"fedbn+{text}").personal, personalizations()),
}


@pytest.mark.parametrize("kind", PARSERS)
def test_parser_accepts_valid_options(kind):
    parser, known = PARSERS[kind]

    @settings(max_examples=8, deadline=None)
    @given(st.tuples(*map(text_of, known.values())))
    def body(drawn):
        for text, cls, values in drawn:
            plugin = parser(text)
            assert type(plugin) is cls
            for f in fields(cls):
                if f.init:
                    assert getattr(plugin, f.name) == values.get(f.name, f.default), text
            assert parser(render(plugin)) == plugin

    body()


@pytest.mark.parametrize(("text", "value"), [(t, v) for v, ts in BOOLEANS.items() for t in ts])
def test_parser_accepts_every_form_of_boolean(text, value):
    parsed = strategy(f"atp:online={text}")
    assert parsed.online is value
    assert strategy(render(parsed)) == parsed


@CASES
@given(plugin_texts(strategies()), plugin_texts(personalizations()))
def test_treatment_accepts_valid_options(norm, personal):
    chosen = treatment(f"{norm[0]}+{personal[0]}")
    assert (chosen.norm, chosen.personal) == (norm[1](**norm[2]), personal[1](**personal[2]))
    assert treatment(str(chosen)) == chosen


@CASES
@given(valid(Privacy).map(lambda values: {"clip": 2.5} | values))
def test_privacy_accepts_valid_options(values):
    text = ":".join(f"{k}={v}" for k, v in values.items())
    assert parse_privacy(text) == Privacy(**values) == parse_privacy(render_privacy(text))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("reference", ("reference", "exact")),
        ("grid", ("grid", "exact")),
        ("grid:stacked", ("grid", "stacked")),
        ("grid:lean", ("grid", "lean")),
        ("grid:auto", ("grid", "auto")),
        ("ray", ("ray", "exact")),
        ("ray:10.0.0.1:6379", ("ray", "exact")),
        ("ray:auto", ("ray", "exact")),
    ],
)
def test_parse_engine_accepts_every_engine(text, expected):
    assert parse_engine(text) == expected


def bounded(f, hint):
    """Values of an option of the plan within its bounds."""
    low, above, below = (f.metadata.get(k) for k in ("low", "above", "below"))
    if hint is int or int in typing.get_args(hint):
        values = st.integers(int(low), int(low) + 500)
        return st.none() | values if NoneType in typing.get_args(hint) else values
    if hint is float:
        smallest = 1e-6 if above is not None else low
        return st.floats(smallest, below or 1e3, exclude_max=below is not None)
    return value_of(hint, f.default)


HINTS = typing.get_type_hints(Plan)
PLANS = st.fixed_dictionaries({}, optional={f.name: bounded(f, HINTS[f.name]) for f in fields(Plan)})
NAMES = {
    "strategy": plugin_texts(strategies()).map(lambda drawn: drawn[0]),
    "partition": plugin_texts(partitions()).map(lambda drawn: drawn[0]),
    "shift": plugin_texts(shifts()).map(lambda drawn: drawn[0]),
    "rule": plugin_texts({k: v for k, v in rules().items() if v.requires in ("", "n0")}).map(lambda drawn: drawn[0]),
    "privacy": st.sampled_from(["", "clip=1.5", "secure=true"]),
    "model": st.sampled_from(["", "mlp", "resnet20"]),
    "seed": st.integers(-3, 10**12),
    "validation": st.booleans(),
}
RUNS = st.fixed_dictionaries({"scenario": st.just("digits8:users=5"), **NAMES})


@CASES
@given(PLANS)
def test_plan_for_accepts_values_within_bounds(values):
    base = plan_for("digits8")
    given_values = {k: v for k, v in values.items() if v is not None}
    assert plan_for("digits8", **values) == replace(base, **given_values)
    texts = ",".join(f"{k.replace('_', '-')}={v}" for k, v in values.items())
    assert run_from_config({"scenario": "digits8", "strategy": "fedbn", "plan": texts}).plan == replace(base, **values)


@CASES
@given(RUNS, PLANS)
def test_run_keeps_its_values_in_every_form(values, plan):
    run = Run(**values, plan=Plan(**plan))
    assert Run.from_dict(json.loads(run.to_json())) == run
    assert run_from_config({"run": run.to_json()}) == run
    resolved = run.resolved()
    assert resolved.resolved() == resolved
    assert (resolved.plan, resolved.seed, resolved.validation) == (run.plan, run.seed, run.validation)
    assert treatment(resolved.strategy) == treatment(run.strategy)
    assert parse(resolved.partition, "", partitions()) == parse(run.partition, "", partitions())
    assert parse(resolved.shift, "", shifts()) == parse(run.shift, "", shifts())
    assert (rule(resolved.rule), scenario(resolved.scenario)) == (rule(run.rule), scenario(run.scenario))
    assert parse_privacy(resolved.privacy) == parse_privacy(run.privacy)
    assert resolved.model == (run.model or "small-cnn")
    config = {k: v for k, v in values.items() if v != ""}
    assert run_from_config(config) == replace(resolved, plan=plan_for("digits8"))


def toml(value):
    if isinstance(value, tuple):
        return "[" + ", ".join(map(toml, value)) + "]"
    return json.dumps(value)


@CASES
@given(RUNS, PLANS, st.booleans())
def test_run_file_keeps_its_values(tmp_path_factory, values, plan, flat):
    rest = {k: values[k] for k in ("scenario", "partition", "shift", "privacy", "model")}
    rest |= {"strategies": ("fedbn", "silobn"), "seeds": 3}
    plan = {k: v for k, v in plan.items() if v is not None}
    lines = [f"{k} = {toml(v)}" for k, v in rest.items()]
    path = tmp_path_factory.mktemp("run") / "run.toml"
    path.write_text("\n".join([*lines, *([] if flat else ["[plan]"]), *(f"{k} = {toml(v)}" for k, v in plan.items())]))
    found = Experiment.from_dict(read_run_file(path))
    assert found.plan == replace(plan_for("digits8"), **plan)
    assert {k: getattr(found, k) for k in rest} == rest
    assert Experiment.from_dict(found.to_dict()) == found
    assert found.run("silobn", 2).seed == 2


DTYPES = [torch.float32, torch.float64, torch.float16, torch.int64, torch.int32, torch.uint8, torch.bool]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_unpack_inverts_pack(dtype):
    for shape in ((), (0,), (3,), (2, 0, 4), (2, 3, 4)):
        value = (torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 5).to(dtype)
        for tensor in (value, value.transpose(0, -1) if value.dim() else value):
            copy = unpack(pack(tensor))
            assert copy.dtype == dtype
            assert torch.equal(copy, tensor)


def test_validator_accepts_valid_entries(small):
    ctx = build_context(small("global-naive"))
    state = {k: v + 1 if v.is_floating_point() else v for k, v in ctx.initial_server_state().items()}
    assert same(ReplyValidator(ctx).entries(0, arrays(state), state), state)


def test_load_outcome_returns_what_was_saved(tmp_path):
    run = Run("digits8", "fedbn", plan=Plan(rounds=3)).resolved()
    states = [{"w": torch.arange(4.0) * i, "n": torch.tensor(i)} for i in range(9)]
    server = Server(*states[:3], {"left": states[3]}, states[4], states[5], {4: states[6]})
    score = Score("own", "aggregated", 7, {"accuracy": 0.1, "loss": math.inf})
    outcome = Outcome(
        server,
        {2: states[7], 5: states[8]},
        [RoundMetrics(1, 0.1), RoundMetrics(2, 1 / 3, 0.25, None)],
        {2: [score]},
        1.5,
        failures=[ClientFailure(2, "no reply")],
        trained={2: 1, 5: 2},
    )
    save_outcome(tmp_path / "c", run, outcome, {"data": "hash"})
    found = load_outcome(tmp_path / "c", run, {"data": "hash"})
    for name in ("state", "serving", "memory", "known", "broadcast"):
        assert same(getattr(found.server, name), getattr(server, name)), name
    for a, b in (
        (found.server.groups, server.groups),
        (found.server.client_statistics, server.client_statistics),
        (found.client_states, outcome.client_states),
    ):
        assert a.keys() == b.keys()
        assert all(same(a[k], b[k]) for k in a)
    plain = ("curve", "scores", "seconds", "failures", "traffic", "trained")
    assert [getattr(found, k) for k in plain] == [getattr(outcome, k) for k in plain]


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 10**6), st.lists(st.integers(4, 30), min_size=2, max_size=4), st.booleans())
def test_data_files_keep_their_values(tmp_path_factory, seed, sizes, has_recordings):
    folder, draw = tmp_path_factory.mktemp("data"), np.random.default_rng(seed)
    n = sum(sizes)
    x = draw.normal(size=(n, 2)).astype(np.float32)
    user = draw.permutation(np.repeat(np.arange(len(sizes)), sizes))
    y, recording = np.zeros((2, n), int)
    for i, size in enumerate(sizes):
        y[user == i] = np.arange(size) % 2
        recording[user == i] = np.arange(size) * 4 // size
    columns = {"y": y, "user": user} | ({"recording": recording} if has_recordings else {})
    np.savez(folder / "d.npz", x=x, **columns)
    frame = pd.DataFrame({"a": x[:, 0], "b": x[:, 1], **columns})
    frame.to_csv(folder / "d.csv", index=False)
    frame.to_parquet(folder / "d.parquet", index=False)
    for name in ("d.npz", "d.csv:x=a+b", "d.parquet:x=a+b"):
        users = scenario(f"files:path={folder / name}:unseen=0:gap=0").load(0).users
        for i, found in enumerate(users):
            rows = np.flatnonzero(user == i)
            is_test = (
                recording[rows] == 3 if has_recordings else np.arange(len(rows)) >= len(rows) - round(len(rows) / 4)
            )
            for part, index in ((found.train, rows[~is_test]), (found.test, rows[is_test])):
                assert torch.equal(part.x, torch.from_numpy(x[index])), name
                assert part.y.tolist() == y[index].tolist()

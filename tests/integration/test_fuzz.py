"""External input yields a value or a clear `UserError`, never another exception."""

from __future__ import annotations

import io
import json
import math
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pandas as pd
import pytest
import torch
from flwr.app import Array, ArrayRecord
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedbn.config import PLAN_FIELDS, Plan
from fedbn.data.partition import parse_partition, partitions
from fedbn.data.shift import parse_shift, shifts
from fedbn.errors import UserError
from fedbn.federation.run import Run, plan_for
from fedbn.federation.server import Outcome, RoundMetrics, Server
from fedbn.federation.setup import build_context
from fedbn.online.rules.base import client_rule, rules
from fedbn.optim.schedules import rate
from fedbn.personalization.base import personalizations
from fedbn.personalization.treatment import treatment
from fedbn.plugins import parse
from fedbn.privacy.mechanism import Privacy, parse_privacy
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

DEFAULT_CASES, SLOW_CASES = 25, 300
"""Cases per test by default and under the slow marker; there are nineteen tests."""

SUPPRESSED_CHECKS = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.filter_too_much]


CASES = pytest.mark.parametrize("cases", [DEFAULT_CASES, pytest.param(SLOW_CASES, marks=pytest.mark.slow)])


def fuzz(cases, test, *values):
    """Call a function with random values. It may raise a `UserError` with a message, but nothing else; not always."""
    messages, accepted = [], []

    @settings(max_examples=cases, suppress_health_check=SUPPRESSED_CHECKS, deadline=None)
    @given(st.tuples(*values))
    def body(drawn):
        try:
            test(*drawn)
            accepted.append(drawn)
        except UserError as error:
            messages.append(str(error))

    body()
    assert all(len(text) > 10 for text in messages)
    assert accepted, "no case was valid"


def fuzzed(*values):
    """Turn a function into a test with few cases by default and many under the slow marker."""

    def decorate(test):
        @CASES
        def run(cases, tmp_path):
            fuzz(cases, partial(test, tmp_path), *values)

        run.__name__ = test.__name__
        return run

    return decorate


VALUES = st.one_of(
    st.sampled_from(
        ["", "none", "nan", "inf", "-inf", "-1", "0", "0.5", "1", "2", "1e400", "9" * 400, "true", "+", "a+b"]
    ),
    st.floats().map(str),
    st.integers(-(10**12), 10**12).map(str),
    st.text(max_size=8),
)


def texts(known, separator=":"):
    """Text that looks like ``name:field=value``, and text that does not."""
    names = st.sampled_from(sorted(known))

    @st.composite
    def close(draw):
        name = draw(names)
        fields = list(getattr(known[name], "__dataclass_fields__", {})) or ["x"]
        option = st.builds("{}={}".format, st.sampled_from([*fields, "bogus"]), VALUES)
        parts = [name, *draw(st.lists(st.one_of(option, st.text(max_size=6)), max_size=3))]
        return separator.join(parts)

    return st.one_of(close(), st.text(max_size=30), st.builds("{},{}".format, close(), close()))


JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), VALUES),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=6), inner, max_size=3)),
    max_leaves=6,
)


ENGINE_NAMES = st.sampled_from(["grid", "ray", "grid:", "grid:x", "ray:stacked"])

PARSERS = {
    "strategy": (strategy, texts(strategies())),
    "treatment": (treatment, st.one_of(texts(strategies()), texts(personalizations()).map(lambda t: f"fedbn+{t}"))),
    "partition": (parse_partition, texts(partitions())),
    "shift": (parse_shift, texts(shifts())),
    "rule": (client_rule, texts(rules())),
    "stream": (lambda text: parse(text, "stream", streams()), texts(streams())),
    "scenario": (scenario, texts(scenarios())),
    "privacy": (parse_privacy, texts({"privacy": Privacy}).map(lambda t: t.removeprefix("privacy:"))),
    "engine": (parse_engine, st.one_of(st.text(max_size=12), ENGINE_NAMES)),
}


@CASES
@pytest.mark.parametrize("name", PARSERS)
def test_parser_fuzz(name, cases):
    fuzz(cases, *PARSERS[name])


@fuzzed(st.dictionaries(st.one_of(st.sampled_from(PLAN_FIELDS), st.text(max_size=4)), JSON, max_size=4))
def test_plan_for_fuzz(tmp_path, values):
    plan = plan_for("digits8", **{k: v for k, v in values.items() if k != "scenario_text"})
    assert plan.rounds >= 1
    assert math.isfinite(rate(plan, 1))


RUN_KEYS = st.sampled_from([*Run.__dataclass_fields__, "strategies", "seeds", "tune", "rates", "bogus"])


@fuzzed(st.dictionaries(RUN_KEYS, JSON, max_size=5), st.booleans())
def test_run_and_experiment_from_dict_fuzz(tmp_path, values, whole):
    if whole:
        values = {"scenario": "digits8", "strategy": "fedbn"} | values
        Run.from_dict(values).resolved()
    else:
        Experiment.from_dict({"scenario": "digits8"} | values).resolved()


@fuzzed(
    st.one_of(
        st.just(b'scenario = "digits8"\nstrategies = ["fedbn"]\n'),
        st.binary(max_size=60),
        st.builds("{} = {}\n[plan]\n{} = {}\n".format, RUN_KEYS, VALUES, RUN_KEYS, VALUES).map(
            lambda t: t.encode("utf-8", "replace")
        ),
    )
)
def test_read_run_file_fuzz(tmp_path, data):
    path = tmp_path / "run.toml"
    path.write_bytes(data)
    Experiment.from_dict(read_run_file(path)).resolved()


@fuzzed(
    st.dictionaries(
        st.sampled_from([*Run.__dataclass_fields__, "run"]),
        st.one_of(VALUES, st.floats(), st.integers(), st.booleans()),
        max_size=4,
    )
)
def test_run_from_config_fuzz(tmp_path, config):
    run_from_config({"scenario": "digits8", "strategy": "fedbn"} | config)


RUN = Run("digits8", "fedbn", plan=Plan(rounds=2)).resolved()


@cache
def checkpoint():
    with TemporaryDirectory() as folder:
        path = Path(folder) / "c.safetensors"
        state = {"w": torch.arange(4.0)}
        save_outcome(path, RUN, Outcome(Server(state, state), curve=[RoundMetrics(1, 0.5)]), {})
        return path.read_bytes()


@st.composite
def damaged(draw, whole):
    """Bytes with random deletions, changes and insertions, sometimes none."""
    data = bytearray(whole())
    for _ in range(draw(st.integers(0, 4))):
        at = draw(st.integers(0, max(0, len(data) - 1)))
        kind = draw(st.sampled_from(["flip", "cut", "add", "head"]))
        if kind == "flip" and data:
            data[at] ^= draw(st.integers(1, 255))
        elif kind == "cut":
            del data[at:]
        elif kind == "head" and len(data) > 64:
            data[draw(st.integers(0, 63))] = draw(st.integers(0, 255))
        else:
            data[at:at] = draw(st.binary(max_size=8))
    return bytes(data)


@fuzzed(st.one_of(damaged(checkpoint), st.binary(max_size=64)))
def test_load_outcome_fuzz(tmp_path, data):
    path = tmp_path / "checkpoint.safetensors"
    path.write_bytes(data)
    assert torch.equal(load_outcome(path, RUN).server.state["w"], torch.arange(4.0)), "damage is detected"


@cache
def table():
    draw = np.random.default_rng(0)
    frame = pd.DataFrame(draw.normal(size=(40, 3)).round(3), columns=["a", "b", "c"])
    return frame.assign(y=np.arange(40) % 2, user=np.arange(40) // 10)


def as_csv():
    return table().to_csv(index=False).encode()


def as_parquet():
    file = io.BytesIO()
    table().to_parquet(file, index=False)
    return file.getvalue()


def as_npz():
    file, t = io.BytesIO(), table()
    np.savez(file, x=t[["a", "b", "c"]].to_numpy(np.float32), y=t.y.to_numpy(), user=t.user.to_numpy())
    return file.getvalue()


FILES = {"csv": as_csv, "parquet": as_parquet, "npz": as_npz}
COLUMNS = {"csv": ":x=a+b+c", "parquet": ":x=a+b+c", "npz": ""}


@CASES
@pytest.mark.parametrize("ending", FILES)
def test_data_file_fuzz(ending, cases, tmp_path):
    path = tmp_path / f"data.{ending}"

    def read(data):
        path.write_bytes(data)
        population = scenario(f"files:path={path}:unseen=1{COLUMNS[ending]}").load(0)
        if data == FILES[ending]():
            x = [[*part.x.tolist()] for u in population.users for part in (u.train, u.test)]
            rows = table().groupby("user")[["a", "b", "c"]]
            expected = [
                f.iloc[rows_].to_numpy("float32").tolist() for _, f in rows for rows_ in (slice(7), slice(8, 10))
            ]
            assert x == expected

    fuzz(cases, read, damaged(FILES[ending]))


HEADERS = st.tuples(
    st.one_of(
        st.sampled_from(["float32", "float64", "int64", "O", "V8", "<U3", "datetime64[s]", "bool"]), st.text(max_size=5)
    ),
    st.lists(st.integers(-2, 2**40), max_size=3).map(tuple),
    st.sampled_from(["numpy.ndarray", "torch", ""]),
)


@pytest.mark.filterwarnings("ignore:Reading `.npy`")  # NumPy also reads headers of Python 2
@fuzzed(st.one_of(damaged(lambda: pack(torch.arange(6.0)).data), st.binary(max_size=100)), HEADERS, st.booleans())
def test_unpack_fuzz(tmp_path, data, header, valid_header):
    unpack(Array("float32", (6,), "numpy.ndarray", data) if valid_header else Array(*header[:2], header[2], data))


@cache
def ctx():
    return build_context(Run("digits8", "fedbn", plan=Plan(rounds=1)).resolved())


def entry(index):
    return list(arrays(ctx().initial_server_state()).values())[index].data


CHANGES = st.integers(0, 3).flatmap(lambda i: st.tuples(st.just(i), damaged(lambda: entry(i))))


@fuzzed(st.lists(CHANGES, max_size=3))
def test_validator_fuzz(tmp_path, changes):
    record = arrays(ctx().initial_server_state())
    names = list(record)
    for i, data in changes:
        old = record[names[i]]
        record[names[i]] = Array(old.dtype, old.shape, old.stype, data)
    state = ReplyValidator(ctx()).entries(0, ArrayRecord(dict(record.items())), ctx().initial)
    assert list(state) == names
    for name, value in state.items():
        expected = ctx().initial[name]
        assert (value.dtype, value.shape) == (expected.dtype, expected.shape)
        assert value.isfinite().all()
        assert torch.equal(value, expected) or name in {names[i] for i, _ in changes}


def test_run_to_json_is_valid_json():
    assert json.loads(RUN.to_json())["privacy"] == ""

"""A minority of clients has little influence on the statistics, and no reply can harm the server."""

from __future__ import annotations

import pickle
import struct

import pytest
import torch
from flwr.app import Array
from hypothesis import given
from hypothesis import strategies as st

from fedbn.errors import UserError
from fedbn.federation.client import client_round
from fedbn.federation.server import Server
from fedbn.federation.setup import build_context
from fedbn.statistics.moments import pooled_variance
from fedbn.statistics.robust import location, robust_moments
from fedbn.strategies.base import Progress, Update, strategy
from fedbn_clients.records import arrays
from fedbn_clients.serialization import pack, unpack
from fedbn_simulations.server.validation import InvalidReply, ReplyValidator
from tests.fedbn.helpers import rejects
from tests.helpers import same

values = st.lists(st.floats(-100, 100, width=32), min_size=5, max_size=11)


@given(values)
def test_robust_moments_without_trim_is_pooled_variance(xs):
    means = [torch.tensor([x]) for x in xs]
    variances = [torch.tensor([abs(x) + 1]) for x in xs]
    center, variance = robust_moments(means, variances, "trimmed", 0.0)
    assert float(variance) == pytest.approx(float(pooled_variance(means, variances, [1.0] * len(xs))), rel=1e-4)
    assert float(center) == pytest.approx(sum(xs) / len(xs), abs=1e-4)


@pytest.mark.parametrize(("how", "trim"), [("median", 0.0), ("trimmed", 0.34)])
def test_location_treats_nan_as_infinity(how, trim):
    assert location([torch.tensor([x]) for x in (1.0, float("nan"), 2.0)], how, trim).item() == 2.0


@given(values, st.sampled_from(["median", "trimmed"]), st.sampled_from([float("nan"), float("inf"), 1e30, -1e30]))
def test_location_stays_in_range_of_honest_clients(xs, how, poison):
    honest = [torch.tensor([x]) for x in xs]
    bad = [torch.tensor([poison])] * (len(xs) // 5)
    estimate = float(location([*honest, *bad], how, 0.25))
    assert min(xs) - 1e-3 <= estimate <= max(xs) + 1e-3


ATTACKS = {
    "huge variance": lambda k, v: v * 0 + 1e12 if k.endswith("var") else v,
    "zero variance": lambda k, v: v * 0 if k.endswith("var") else v,
    "far mean": lambda k, v: v + 1e6 if k.endswith("mean") else v,
    "flipped": lambda k, v: -v if k.endswith("mean") else v,
    "nan": lambda k, v: v * float("nan"),
}


def poisoned(ctx, attack, bad):
    """Server statistics after one round in which the users ``bad`` send poisoned statistics."""
    server, updates = Server(ctx.initial_server_state(), ctx.initial_server_state()), []
    for user in ctx.trainers:
        update, _ = client_round(ctx, user, ctx.initial_server_state(), None, Progress(1, 2))
        if user in bad:
            state = {k: attack(k, v) if "running" in k else v for k, v in update.state.items()}
            update = Update(update.user, state, update.examples, update.loss)
        updates.append(update)
    server.advance(ctx, updates, 1)
    return {k: v for k, v in server.state.items() if "running" in k}


def distance(state, other):
    return max(float(((state[k] - other[k]).abs() / (other[k].abs() + 1)).nan_to_num(1e9).max()) for k in other)


@pytest.mark.parametrize("name", ATTACKS)
@pytest.mark.parametrize("text", ["global-robust", "global-robust:how=median"])
def test_global_robust_limits_poisoned_statistics(name, text, small):
    ctx = build_context(small(text))
    bad, honest = (poisoned(ctx, ATTACKS[name], users) for users in (set(ctx.trainers[:1]), set()))
    assert distance(bad, honest) < 0.5


@pytest.mark.parametrize("name", ["huge variance", "far mean", "nan"])
def test_global_pooled_is_changed_by_poisoned_statistics(name, small):
    ctx = build_context(small("global-pooled"))
    bad, honest = (poisoned(ctx, ATTACKS[name], users) for users in (set(ctx.trainers[:1]), set()))
    assert distance(bad, honest) > 100


@pytest.mark.parametrize(
    ("text", "clients", "withstands"),
    [
        *[("global-robust", n, w) for n, w in ((1, 0), (4, 0), (5, 1), (9, 1), (10, 2))],
        *[("global-robust:how=median", n, w) for n, w in ((1, 0), (2, 0), (3, 1), (4, 1), (5, 2))],
        *[("global-robust:trim=0.35", n, w) for n, w in ((2, 0), (3, 1))],
    ],
)
def test_global_robust_withstands_so_many_clients(text, clients, withstands):
    """One more poisoning client changes the statistics at will, and a notice says when a single one does."""
    robust = strategy(text)
    assert robust.withstands(clients) == withstands
    assert bool(robust.notices(clients)) is (withstands == 0)
    for poisoned in {withstands, withstands + 1}:
        values = [torch.tensor([1e9])] * poisoned + [torch.zeros(1)] * (clients - poisoned)
        assert (float(location(values, robust.how, robust.trim)) == 0) is (poisoned <= withstands)


@pytest.mark.parametrize(
    ("options", "protected"),
    [({}, True), ({"clients_per_round": 4}, False), ({"clients_per_round": 5}, True), ({"tolerate": 0.5}, False)],
)
def test_run_with_too_few_clients_to_trim_has_a_notice(options, protected, small):
    ctx = build_context(small("global-robust", **options))
    (notice,) = [n for n in ctx.notices if "global-robust" in n] or [""]
    assert not notice if protected else "protects nothing with 4 clients in a round" in notice


@pytest.mark.parametrize("text", ["global-robust:trim=0.5", "global-robust:trim=-0.1"])
def test_global_robust_rejects_bad_trim(text):
    rejects(r"\[0, 0.5\)", strategy, text)


# Validation of replies


def npy(header, body=b""):
    """A file in NumPy format with the given header."""
    text = header.encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + body


class CodePayload:
    def __reduce__(self):
        return (pytest.fail, ("code of a client was run",))


PICKLE = pickle.dumps(CodePayload())
HOSTILE = {
    "a header that claims terabytes": npy("{'descr': '<f8', 'fortran_order': False, 'shape': (10000000000000,)}"),
    "a pickle in place of values": npy("{'descr': '|O', 'fortran_order': False, 'shape': (1,)}", PICKLE),
    "a bare pickle": PICKLE,
    "code in the header": npy("__import__('os').abort()"),
    "nothing": b"",
    "negative sizes": npy("{'descr': '<f8', 'fortran_order': False, 'shape': (-1,)}", b"12345678"),
    "too few values": npy("{'descr': '<f4', 'fortran_order': False, 'shape': (3,)}", b"1234"),
    "another version": b"\x93NUMPY\x09\x00" + b"x" * 64,
    "a zip bomb's name": b"PK\x03\x04" + b"\0" * 64,
}


@pytest.mark.parametrize("name", HOSTILE)
def test_unpack_rejects_hostile_bytes(name):
    rejects("cannot be read", unpack, Array("float32", (3,), "numpy.ndarray", HOSTILE[name]))


@pytest.mark.parametrize(
    ("dtype", "shape"), [("float31", (3,)), ("O", (3,)), ("float32", (-3,)), ("float32", (10**13,)), ("float32", (4,))]
)
def test_unpack_rejects_wrong_dtype_or_shape(dtype, shape):
    data = pack(torch.zeros(3)).data
    try:
        tensor = unpack(Array(dtype, shape, "numpy.ndarray", data))
    except UserError:
        return
    assert tensor.shape == (3,)


def test_validator_rejects_bad_entries(small):
    ctx = build_context(small("fedbn"))
    validator, good = ReplyValidator(ctx), ctx.initial_server_state()
    first = next(iter(good))
    assert same(validator.entries(3, arrays(good), good), good)
    wrong = {
        "unexpected or missing entries": {k: v for k, v in good.items() if k != first},
        "extra": good | {"extra": torch.zeros(1)},
        "expected torch.float32": good | {first: good[first].double()[..., :1].float()},
        "NaN or Inf": good | {first: good[first] * float("nan")},
        "as torch.float64|bytes for": good | {first: good[first].double()},
        "bytes for": good | {first: torch.zeros(100_000)},
    }
    for match, state in wrong.items():
        with pytest.raises(InvalidReply, match=rf"client 3 .*({match}).*its reply was discarded"):
            validator.entries(3, arrays(state), good)
    hostile = arrays(good)
    hostile[first] = Array("float32", (3,), "numpy.ndarray", HOSTILE["a bare pickle"])
    with pytest.raises(InvalidReply, match="cannot be read"):
        validator.entries(3, hostile, good)


def test_validator_rejects_bad_notes(small):
    """The server rejects notes that are undeclared, incomplete, too large, not finite, negative or unreadable."""
    validator = ReplyValidator(build_context(small("fedap+scaffold")))
    moments, control = validator.schemas.notes
    good = {k: torch.ones(spec.shape, dtype=spec.dtype) for k, spec in (moments | control).items()}
    notes = next(k for k in moments if k.endswith("|m2"))
    count, gradient = notes.replace("|m2", "|n"), next(iter(control))
    assert same(validator.notes(3, arrays(good)), good)
    assert same(validator.notes(3, arrays({gradient: good[gradient]})), {gradient: good[gradient]})
    wrong = {
        r"notes that fedap\+scaffold does not declare: x": good | {"x": torch.ones(1)},
        "unexpected or missing entries: moments/": {k: v for k, v in good.items() if k != notes},
        "bytes for": good | {notes: torch.zeros(10_000_000)},
        "as torch.float32": good | {notes: good[notes].float()},
        "NaN or Inf in moments/": good | {notes: good[notes] * float("nan")},
        "NaN or Inf in control/": good | {gradient: good[gradient] * float("inf")},
        "-1 in moments/": good | {notes: -good[notes]},
        "0 in moments/": good | {count: good[count] * 0},
        r"1e\+30 in moments/": good | {count: good[count] * 1e30},
        r"3e\+38 in control/": good | {gradient: good[gradient] * 3e38},
    }
    for match, state in wrong.items():
        with pytest.raises(InvalidReply, match=rf"client 3 .*({match}).*its reply was discarded"):
            validator.notes(3, arrays(state))
    broken = arrays(good)
    broken[gradient] = Array("float32", (3,), "numpy.ndarray", b"junk")
    with pytest.raises(InvalidReply, match="cannot be read"):
        validator.notes(3, broken)

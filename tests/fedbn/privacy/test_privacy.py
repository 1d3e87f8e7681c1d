"""What leaves a client is bounded, noised, summed or not sent, as the run says."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, RecordDict
from flwr.clientapp import ClientApp
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from clients.app import app as client_app
from fedbn.errors import UserError
from fedbn.federation.client import client_round
from fedbn.federation.loop import federate
from fedbn.federation.protection import MASKED, masked, opened, protected, statement
from fedbn.federation.setup import build_context
from fedbn.nn.roles import Role
from fedbn.privacy.accounting import epsilon
from fedbn.privacy.mechanism import (
    Privacy,
    clipped,
    from_sums,
    parameter_keys,
    parse_privacy,
    released,
    render_privacy,
    statistics_pairs,
    to_sums,
)
from fedbn.privacy.secure_aggregation import decode, encode, mask, total
from fedbn.seeds import generator
from fedbn.statistics.moments import Moments, pooled
from fedbn.strategies.base import Progress, Update, strategies
from fedbn.strategies.ownership import LOCAL
from simulations.engines.execute import execute
from simulations.engines.grid import InProcessGrid
from simulations.flower.compat import task_identity
from simulations.server.rounds import Listener, run_rounds
from tests.helpers import same

PAIRS = [("bn.running_mean", "bn.running_var")]
FIRST = Progress(1, 2)
finite = st.floats(-1e3, 1e3, width=32)


def private(run, text):
    return replace(run, privacy=text).resolved()


def layer(mean, variance):
    return {"bn.running_mean": torch.tensor(mean), "bn.running_var": torch.tensor(variance)}


def trained(ctx, user=0):
    received = ctx.start()
    return client_round(ctx, user, received, None, FIRST)[0], received


@pytest.mark.parametrize("engine", ["reference", "grid"])
def test_no_noise_and_no_bound_is_no_privacy_to_the_last_bit(engine, small):
    plain = small("global-pooled", rounds=1, clients_per_round=3)
    open_ = private(plain, "noise=0:clip=inf:floor=0.5")
    assert open_.privacy
    assert same(execute(plain, engine).server.state, execute(open_, engine).server.state)


@pytest.mark.parametrize("text", ["clip=0.5:noise=0.1", "secure=true", "clip=0.5:noise=0.1:secure=true"])
@pytest.mark.parametrize("strategy", ["global-pooled", "silobn"])
def test_reference_and_grid_agree(text, strategy, small):
    run = private(small(strategy, rounds=1, clients_per_round=3), text)
    loop, grid = execute(run, "reference"), execute(run, "grid")
    assert same(loop.server.state, grid.server.state)
    plain = execute(small(strategy, rounds=1, clients_per_round=3), "reference")
    assert not same(loop.server.state, plain.server.state)


def test_the_text_is_part_of_the_run_in_its_shortest_form(small):
    assert private(small(), "noise=0.0:clip=1").privacy == "clip=1.0"
    assert private(small(), "clip=1").id != small().id
    assert render_privacy("noise=0") == "" == render_privacy("")
    assert parse_privacy("secure=true") == Privacy(secure=True)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("clip=0", "clip must be positive"),
        ("clip=nan", "clip must be positive"),
        ("clip_statistics=-1:clip=1", "clip_statistics must be positive"),
        ("noise=1", "give clip too"),
        ("clip=1:noise=-1", "at least 0"),
        ("clip=1:noise=inf", "finite"),
        ("clip=1:floor=0", "floor is a share"),
        ("clip=1:delta=1", "delta lies between"),
        ("secure=true:bits=60", "bits must lie between"),
        ("klip=1", "Did you mean 'clip'"),
        ("clip", "field=value"),
    ],
)
def test_a_wrong_setting_is_named(text, match):
    with pytest.raises(UserError, match=match):
        parse_privacy(text)


@given(st.lists(finite, min_size=1, max_size=8), st.floats(1e-3, 1e3))
def test_nothing_sent_is_longer_than_its_bound(values, bound):
    vector = torch.tensor(values, dtype=torch.float64)
    out = clipped(vector, bound)
    assert float(torch.linalg.vector_norm(out)) <= bound
    if float(torch.linalg.vector_norm(vector)) <= bound:
        assert out is vector
    else:  # only the length changes
        assert torch.allclose(out / out.norm(), vector / vector.norm())


@given(
    hnp.arrays(np.float32, 3, elements=finite),
    hnp.arrays(np.float32, 3, elements=st.floats(0, 1e3, width=32)),
    hnp.arrays(np.float32, 3, elements=finite),
    hnp.arrays(np.float32, 3, elements=st.floats(0.001953125, 1e3, width=32)),
    hnp.arrays(np.float64, 6, elements=st.floats(-1e4, 1e4)),
)
def test_variances_stay_positive_whatever_the_noise(mean, var, center_mean, center_var, noise):
    center = layer(center_mean, center_var)
    out = from_sums(to_sums(layer(mean, var), center, PAIRS) + torch.from_numpy(noise), center, PAIRS, 1e-3)
    assert (out["bn.running_var"] > 0).all()
    assert (out["bn.running_var"].double() >= 0.999e-3 * center["bn.running_var"].double()).all()


@given(hnp.arrays(np.float32, 4, elements=st.floats(-8, 8, width=32)), st.floats(0.0625, 16))
def test_shifted_sums_give_moments_back(mean, scale):
    state = layer(mean, np.full(4, scale, np.float32))
    center = layer(np.float32(mean / 2), np.full(4, 1.0, np.float32))
    back = from_sums(to_sums(state, center, PAIRS), center, PAIRS, 1e-9)
    for key in state:
        assert torch.allclose(back[key], state[key], rtol=1e-5, atol=1e-6)


def test_an_update_is_bounded_part_by_part_and_counts_are_not_sent(small):
    ctx = build_context(private(small("global-pooled"), "clip=0.1:clip_statistics=0.2"))
    update, received = trained(ctx)
    out = released(ctx.privacy, update, received, ctx.ownership, generator(0, "test"))
    keys, pairs = parameter_keys(ctx.ownership), statistics_pairs(ctx.ownership)
    moved = torch.cat([(out.state[k].double() - received[k].double()).flatten() for k in keys])
    assert float(moved.norm()) == pytest.approx(0.1, rel=1e-4)
    assert float(to_sums(out.state, received, pairs).norm()) == pytest.approx(0.2, rel=1e-4)
    assert out.examples == 1 < update.examples
    assert list(out.state) == list(update.state)
    assert not any(ctx.ownership.roles[k] is Role.COUNTER for k in out.state)


def test_noise_has_the_scale_that_is_accounted_for(small):
    ctx = build_context(private(small("global-pooled"), "clip=0.5:noise=2:clip_statistics=0.25"))
    update, received = trained(ctx)
    quiet = released(replace(ctx.privacy, noise=0.0), update, received, ctx.ownership, generator(0, "a"))
    loud = released(ctx.privacy, update, received, ctx.ownership, generator(0, "a"))
    keys = parameter_keys(ctx.ownership)
    added = torch.cat([(loud.state[k].double() - quiet.state[k].double()).flatten() for k in keys])
    assert float(added.std()) == pytest.approx(2 * 0.5, rel=0.05)
    means = torch.cat(
        [
            (loud.state[m].double() - quiet.state[m].double()) / received[v].double().sqrt()
            for m, v in statistics_pairs(ctx.ownership)
        ]
    )
    assert float(means.std()) == pytest.approx(2 * 0.25, rel=0.3)


def test_what_is_within_its_bound_is_noised_all_the_same(small):
    ctx = build_context(private(small("global-pooled"), "clip=1000:noise=0.001"))
    update, received = trained(ctx)
    out = released(ctx.privacy, update, received, ctx.ownership, generator(0, "a"))
    for key in ("mean", "var", "weight"):
        names = [k for k in out.state if k.endswith(key)]
        assert names
        assert not any(torch.equal(out.state[k], update.state[k]) for k in names), key


def test_no_two_messages_of_a_run_have_the_same_noise(small):
    ctx = build_context(private(small("global-pooled"), "clip=1:noise=1"))
    update, received = trained(ctx)
    first, later, others = (
        protected(ctx, message, received, Progress(number, 3)).state
        for message, number in ((update, 1), (update, 2), (replace(update, user=update.user + 1), 1))
    )
    for key in first:
        assert not torch.equal(first[key], later[key]), "the difference of two rounds would be free of noise"
        assert not torch.equal(first[key], others[key])


def test_noise_comes_from_the_run_or_from_nowhere_that_can_be_repeated(small):
    one = private(small("global-pooled", rounds=1, clients_per_round=2), "clip=1:noise=1")
    assert same(federate(one).server.state, federate(one).server.state)
    other = private(one, "clip=1:noise=1:entropy=system")
    assert not same(federate(other).server.state, federate(other).server.state)


def test_an_update_that_is_not_finite_cannot_be_bounded():
    with pytest.raises(UserError, match="lower the learning rate"):
        clipped(torch.tensor([1.0, math.nan]), 1.0)


def test_epsilon_is_that_of_the_gaussian_mechanism():
    # Mironov 2017: RDP of order a is a / (2 s^2); the classical conversion bounds the accountant's from above.
    sigma, delta = 4.0, 1e-5
    by_hand = min(a / (2 * sigma**2) + math.log(1 / delta) / (a - 1) for a in np.arange(1.1, 200, 0.1))
    assert 0.7 * by_hand < epsilon(sigma, 1, delta) <= by_hand + 1e-6
    assert epsilon(sigma, 4, delta) == pytest.approx(epsilon(sigma / 2, 1, delta))
    assert epsilon(sigma, 10, delta) > epsilon(sigma, 1, delta) > epsilon(2 * sigma, 1, delta)


def test_the_statement_says_what_is_guaranteed_and_what_not(small):
    ctx = build_context(private(small("global-pooled", rounds=4, clients_per_round=2), "clip=1:noise=8"))
    said = " ".join(ctx.notices)
    often = max(sum(u in ctx.sampled(r) for r in range(1, 5)) for u in ctx.trainers)
    assert 0 < often < 4
    assert f"epsilon = {epsilon(4.0, often * 2, 1e-5):.3g} at delta = 1e-05" in said
    assert "user-level" in said
    assert "losses and scores" in said
    assert "examples are not sent" in said
    assert "comes from the run's seed" in said
    assert "2 noised parts" in said
    one = " ".join(build_context(private(small("silobn"), "clip=1:noise=8")).notices)
    assert "1 noised parts" in one
    assert "no differential privacy" in " ".join(build_context(private(small(), "clip=1")).notices)
    assert "nothing but losses" in " ".join(build_context(private(small("local"), "clip=1:noise=1")).notices)
    assert "sees only the sums" in " ".join(build_context(private(small(), "clip=1:noise=1:secure=true")).notices)
    assert statement(build_context(small())) == []


@pytest.mark.parametrize(
    ("strategy", "text", "match"),
    [
        ("centralized", "clip=1", "one place"),
        ("global-recalibrated", "clip=1", "syncs_statistics"),
        ("fedtan", "clip=1", "syncs_first_batch"),
        ("fedap", "secure=true", "looks at each|sends more"),
        ("divergence-pooled", "secure=true", "looks at each"),
        ("global-robust", "secure=true", "looks at each"),
    ],
)
def test_what_is_not_covered_is_refused_before_work_starts(strategy, text, match, small):
    with pytest.raises(UserError, match=match):
        build_context(private(small(strategy), text))


def test_a_secure_sum_of_one_is_refused(small):
    with pytest.raises(UserError, match="at least 2"):
        build_context(private(small(clients_per_round=1), "secure=true"))


def test_accounting_without_the_accountant_says_what_to_install(small, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "opacus.accountants.analysis", None)
    with pytest.raises(UserError, match=r"fedbn\[privacy\]"):
        epsilon(1.0, 1, 1e-5)


# Secure sums


vectors = st.integers(2, 6).flatmap(
    lambda clients: hnp.arrays(np.float64, (clients, 5), elements=st.floats(-1e4, 1e4, allow_subnormal=False))
)


@given(vectors, st.integers(0, 2**31), st.integers(12, 32))
def test_masked_messages_sum_to_what_was_encoded(values, seed, bits):
    clients = [3 * i + 1 for i in range(len(values))]
    plain = [encode(torch.from_numpy(v), bits, len(values)) for v in values]
    hidden = [p + mask(c, clients, 5, seed, 1) for p, c in zip(plain, clients)]
    assert np.array_equal(total(hidden), total(plain))
    exact = values.sum(0)
    found = decode(total(hidden), bits).numpy()
    assert np.abs(found - exact).max() <= len(values) * 0.5 / 2**bits + 1e-10


@given(vectors)
def test_the_sum_of_encodings_is_the_pooled_moments(values):
    rows = [torch.from_numpy(v - values[0, 0])[:, None] for v in values]  # shifted, as clients do
    want = pooled([Moments.of(r) for r in rows])
    sums = [torch.stack([torch.tensor(len(r)).double(), r.sum(), (r**2).sum()]) for r in rows]
    n, first, second = decode(total([encode(s, 16, len(rows)) for s in sums]), 16)
    assert n == want.n
    step = len(rows) / 2**17
    assert float(first / n) == pytest.approx(float(want.mean), abs=step + 1e-6)
    assert float(second / n - (first / n) ** 2) == pytest.approx(float(want.variance()), rel=1e-6, abs=1e-2)


def test_a_masked_message_alone_is_uniform_whatever_it_holds():
    from scipy.stats import chisquare, kstest

    for value in (0.0, 1234.5):
        words = encode(torch.full((4096,), value), 24, 3) + mask(1, [0, 1, 2], 4096, 7, 1)
        assert kstest(words / 2.0**64, "uniform").pvalue > 0.001
        for shift in (0, 28, 56):  # low, middle and high bytes
            counts = np.bincount(((words >> np.uint64(shift)) & np.uint64(255)).astype(int), minlength=256)
            assert chisquare(counts).pvalue > 0.001
    assert not np.array_equal(mask(1, [0, 1, 2], 8, 7, 1), mask(1, [0, 1, 2], 8, 7, 2))


@pytest.mark.parametrize("value", [math.nan, math.inf, 2.0**40])
def test_what_does_not_fit_is_an_error_not_a_wrong_sum(value):
    with pytest.raises(UserError, match="does not fit"):
        encode(torch.tensor([value]), 24, 4)


def test_the_largest_numbers_do_not_run_over():
    limit = 2.0 ** (62 - 24) / 4
    assert float(decode(total([encode(torch.tensor([limit]), 24, 4)] * 4), 24)) == 4 * limit
    assert float(decode(total([encode(torch.tensor([-limit]), 24, 4)] * 4), 24)) == -4 * limit
    with pytest.raises(UserError, match="of 4 clients with 24 bits"):
        encode(torch.tensor([1.01 * limit]), 24, 4)


@pytest.mark.parametrize("strategy", ["global-pooled", "global-naive", "fedbn", "fedbn-seeded", "silobn"])
def test_secure_sums_pool_as_the_strategy_does(strategy, small):
    plain = replace(small(strategy, rounds=1, clients_per_round=4), partition="linear:clients=6").resolved()
    ctx = build_context(plain)
    assert len({len(ctx.training_data(u)) for u in ctx.sampled(1)}) > 1  # so that weights matter
    want, found = federate(plain), federate(private(plain, "secure=true"))
    for key, value in want.server.state.items():
        assert torch.allclose(found.server.state[key], value, atol=2e-6, rtol=2e-6), key
    assert found.server.client_statistics == {}  # nobody's own statistics are known


def test_rounding_leaves_no_variance_of_a_secure_sum_below_zero(small):
    run = private(small("global-pooled", rounds=1, clients_per_round=2), "secure=true:bits=8")
    ctx, start = build_context(run), build_context(run).start()
    (mean, var), *_ = statistics_pairs(ctx.ownership)
    dead = start | {mean: torch.full_like(start[mean], 0.3), var: torch.zeros_like(start[var])}
    messages = [masked(ctx, Update(u, dead, 1, 0.0), start, FIRST) for u in ctx.sampled(1)]
    state = opened(ctx, messages, start, 1).state
    assert (state[var] >= 0).all()
    assert torch.allclose(state[mean], dead[mean], atol=2**-8)


def test_a_missing_client_stops_a_secure_round(small):
    ctx = build_context(private(small("fedbn"), "secure=true"))
    messages = [masked(ctx, trained(ctx, u)[0], ctx.start(), FIRST) for u in ctx.trainers[:-1]]
    assert messages[0].state.keys() == {MASKED}
    from fedbn.federation.server import Server

    with pytest.raises(UserError, match="did not reply"):
        Server(ctx.start(), ctx.start()).advance(ctx, messages, 1)


# What leaves a client


def messages_of(run):
    """All replies of clients in a run, as bytes by record and entry, and what the clients keep."""
    ctx, seen = build_context(run), []

    def watched(message, context):
        reply = client_app(message, context)
        seen.append((message.metadata.message_type, context.node_config["partition-id"], reply.content))
        return reply

    app = ClientApp()
    app.__class__ = type("Watched", (ClientApp,), {"__call__": lambda self, m, c: watched(m, c)})
    grid = InProcessGrid(app, len(ctx.population.users), {"run": run.to_json()})
    with task_identity(grid.run.run_id):
        run_rounds(grid, run, Listener())
    return ctx, seen, grid


QUICK = {"fedbn", "fedbn-seeded", "silobn", "mtfl", "local", "global-pooled"}


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in strategies()])
def test_what_is_local_is_in_no_message(name, small):
    """Neither by name nor by value: its bytes are in nothing that a client sends."""
    ctx, seen, grid = messages_of(small(name, rounds=1, eval_every=1))
    local = ctx.ownership.keys(LOCAL)
    assert seen
    for kind, user, content in seen:
        assert all(isinstance(record, ArrayRecord) or n in {"metrics", "info"} for n, record in content.items()), kind
        arrays = [(n, k, a) for n, r in content.array_records.items() for k, a in r.items()]
        sent = {k for n, k, _ in arrays if n == "arrays"}
        assert sent <= set(ctx.ownership.travels)
        kept = grid.partition_context(user).state.array_records.get(f"client-state-{user}", ArrayRecord())
        for key in local:
            if key not in kept or ctx.initial[key].numel() < 4 or torch.equal(unpacked(kept[key]), ctx.initial[key]):
                continue  # too few values to be told from others by their bytes, or never trained
            secret = unpacked(kept[key]).numpy().tobytes()
            assert not any(secret in a.data for _, _, a in arrays), (name, kind, key)


def unpacked(array):
    return torch.from_numpy(array.numpy().copy())


@pytest.mark.parametrize("text", ["clip=0.5:noise=0.5", "secure=true"])
def test_a_protected_message_holds_none_of_the_clients_own_values(text, small):
    run = private(small("global-pooled", rounds=1), text)
    ctx, seen, _ = messages_of(run)
    told = {user: content for kind, user, content in seen if kind == "train"}
    for user in ctx.trainers:
        own, _ = trained(ctx, user)
        sent = b"".join(a.data for a in told[user].array_records["arrays"].values())
        for key, value in own.state.items():
            if value.numel() >= 4:
                assert value.numpy().tobytes() not in sent, key
        assert told[user].metric_records["metrics"]["num-examples"] == 1
        assert isinstance(told[user], RecordDict)

"""Clipping, noise, accounting and secure sums, and the contents of clients' messages."""

from __future__ import annotations

import math
import sys
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, RecordDict
from flwr.clientapp import ClientApp
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fedbn.errors import UserError
from fedbn.federation.client import client_round
from fedbn.federation.loop import federate
from fedbn.federation.protection import MASKED, mask_update, message_size, privacy_notices, protect_update, unmask_mean
from fedbn.federation.server import Server
from fedbn.federation.setup import build_context
from fedbn.nn.roles import Role
from fedbn.privacy.accounting import epsilon
from fedbn.privacy.mechanism import (
    Privacy,
    clip_and_noise,
    clip_norm,
    flatten_entries,
    from_sums,
    parse_privacy,
    render_privacy,
    statistics_pairs,
    to_sums,
)
from fedbn.privacy.secure_aggregation import decode, encode, modular_sum, pairwise_mask
from fedbn.seeds import generator
from fedbn.statistics.moments import Moments, pooled
from fedbn.strategies.base import Progress, Update, strategies
from fedbn.strategies.ownership import LOCAL
from fedbn_clients.app import app as client_app
from fedbn_simulations.engines.execute import execute
from fedbn_simulations.engines.grid import InProcessGrid
from fedbn_simulations.flower.compat import task_identity
from fedbn_simulations.server.rounds import Listener, run_rounds
from tests.helpers import assert_engines_agree, mostly_slow, same

PAIRS = [("bn.running_mean", "bn.running_var")]
FIRST = Progress(1, 2)
finite = st.floats(-1e3, 1e3, width=32)


def with_privacy(run, text):
    return replace(run, privacy=text).resolved()


def layer(mean, variance):
    return {"bn.running_mean": torch.tensor(mean), "bn.running_var": torch.tensor(variance)}


def trained(ctx, user=0):
    received = ctx.initial_server_state()
    return client_round(ctx, user, received, None, FIRST)[0], received


@pytest.mark.parametrize("engine", ["reference", "grid"])
def test_privacy_without_noise_and_clipping_changes_nothing(engine, small):
    plain = small("global-pooled", rounds=1, clients_per_round=3)
    unprotected = with_privacy(plain, "noise=0:clip=inf:floor=0.5")
    assert unprotected.privacy
    assert same(execute(plain, engine).server.state, execute(unprotected, engine).server.state)


BOTH = "clip=0.5:noise=0.1:secure=true"


@pytest.mark.parametrize("text", mostly_slow(["clip=0.5:noise=0.1", "secure=true", BOTH], BOTH))
@pytest.mark.parametrize("strategy", mostly_slow(["global-pooled", "silobn"], "silobn"))
def test_privacy_engines_agree(text, strategy, small):
    plain = small(strategy, rounds=1, clients_per_round=3)
    protected = assert_engines_agree(with_privacy(plain, text))
    assert not same(protected.server.state, execute(plain, "reference").server.state)


def test_run_stores_shortest_privacy_text(small):
    assert with_privacy(small(), "noise=0.0:clip=1").privacy == "clip=1.0"
    assert with_privacy(small(), "clip=1").id != small().id
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
        ("clip=1:floor=0", "floor, a share of"),
        ("clip=1:delta=1", "delta must lie between"),
        ("secure=true:bits=60", "bits must lie between"),
        ("klip=1", "Did you mean 'clip'"),
        ("clip", "field=value"),
    ],
)
def test_parse_privacy_rejects_bad_input(text, match):
    with pytest.raises(UserError, match=match):
        parse_privacy(text)


@given(st.lists(finite, min_size=1, max_size=8), st.floats(1e-3, 1e3))
def test_clip_norm_respects_bound(values, bound):
    vector = torch.tensor(values, dtype=torch.float64)
    out = clip_norm(vector, bound)
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
def test_from_sums_keeps_variances_positive_under_noise(mean, var, center_mean, center_var, noise):
    center = layer(center_mean, center_var)
    out = from_sums(to_sums(layer(mean, var), center, PAIRS) + torch.from_numpy(noise), center, PAIRS, 1e-3)
    assert (out["bn.running_var"] > 0).all()
    assert (out["bn.running_var"].double() >= 0.999e-3 * center["bn.running_var"].double()).all()


@given(hnp.arrays(np.float32, 4, elements=st.floats(-8, 8, width=32)), st.floats(0.0625, 16))
def test_from_sums_inverts_to_sums(mean, scale):
    state = layer(mean, np.full(4, scale, np.float32))
    center = layer(np.float32(mean / 2), np.full(4, 1.0, np.float32))
    restored = from_sums(to_sums(state, center, PAIRS), center, PAIRS, 1e-9)
    for key in state:
        assert torch.allclose(restored[key], state[key], rtol=1e-5, atol=1e-6)


def test_clip_and_noise_clips_parts_and_hides_counts(small):
    ctx = build_context(with_privacy(small("global-pooled"), "clip=0.1:clip_statistics=0.2"))
    update, received = trained(ctx)
    out = clip_and_noise(ctx.privacy, update, received, ctx.ownership, generator(0, "test"))
    keys, pairs = ctx.ownership.shared_parameters, statistics_pairs(ctx.ownership)
    change = flatten_entries(out.state, keys) - flatten_entries(received, keys)
    assert float(change.norm()) == pytest.approx(0.1, rel=1e-4)
    assert float(to_sums(out.state, received, pairs).norm()) == pytest.approx(0.2, rel=1e-4)
    assert out.examples == 1 < update.examples
    assert list(out.state) == list(update.state)
    assert not any(ctx.ownership.roles[k] is Role.COUNTER for k in out.state)


def test_clip_and_noise_uses_accounted_scale(small):
    ctx = build_context(with_privacy(small("global-pooled"), "clip=0.5:noise=2:clip_statistics=0.25"))
    update, received = trained(ctx)
    clipped = clip_and_noise(replace(ctx.privacy, noise=0.0), update, received, ctx.ownership, generator(0, "a"))
    noised = clip_and_noise(ctx.privacy, update, received, ctx.ownership, generator(0, "a"))

    def noise(keys):
        return flatten_entries(noised.state, keys) - flatten_entries(clipped.state, keys)

    assert float(noise(ctx.ownership.shared_parameters).std()) == pytest.approx(2 * 0.5, rel=0.05)
    means, variances = zip(*statistics_pairs(ctx.ownership))
    scale = flatten_entries(received, variances).sqrt()
    assert float((noise(means) / scale).std()) == pytest.approx(2 * 0.25, rel=0.3)


def test_noise_is_added_below_clip_bound(small):
    ctx = build_context(with_privacy(small("global-pooled"), "clip=1000:noise=0.001"))
    update, received = trained(ctx)
    out = clip_and_noise(ctx.privacy, update, received, ctx.ownership, generator(0, "a"))
    for key in ("mean", "var", "weight"):
        assert (names := [k for k in out.state if k.endswith(key)])
        assert not any(torch.equal(out.state[k], update.state[k]) for k in names), key


def test_noise_differs_between_rounds_and_clients(small):
    ctx = build_context(with_privacy(small("global-pooled"), "clip=1:noise=1"))
    update, received = trained(ctx)
    first, other_round, other_client = (
        protect_update(ctx, message, received, Progress(number, 3)).state
        for message, number in ((update, 1), (update, 2), (replace(update, user=update.user + 1), 1))
    )
    for key in first:
        assert not torch.equal(first[key], other_round[key]), "the difference of two rounds would be free of noise"
        assert not torch.equal(first[key], other_client[key])


@pytest.mark.slow
def test_noise_entropy_run_is_reproducible_system_is_not(small):
    run = small("global-pooled", rounds=1, clients_per_round=2)
    for entropy, equal in (("run", True), ("system", False)):
        a, b = (federate(with_privacy(run, f"clip=1:noise=1:entropy={entropy}")).server.state for _ in range(2))
        assert same(a, b) is equal


def test_clip_norm_rejects_nonfinite_update():
    with pytest.raises(UserError, match="lower the learning rate"):
        clip_norm(torch.tensor([1.0, math.nan]), 1.0)


def test_epsilon_matches_gaussian_mechanism():
    # Mironov 2017: RDP of order a is a / (2 s^2); the classical conversion bounds the accountant's from above.
    sigma, delta = 4.0, 1e-5
    expected = min(a / (2 * sigma**2) + math.log(1 / delta) / (a - 1) for a in np.arange(1.1, 200, 0.1))
    assert 0.7 * expected < epsilon(sigma, 1, delta) <= expected + 1e-6
    assert epsilon(sigma, 4, delta) == pytest.approx(epsilon(sigma / 2, 1, delta))
    assert epsilon(sigma, 10, delta) > epsilon(sigma, 1, delta) > epsilon(2 * sigma, 1, delta)


def test_privacy_notices_state_guarantees_and_limits(small):
    ctx = build_context(with_privacy(small("global-pooled", rounds=4, clients_per_round=2), "clip=1:noise=8"))
    notices = " ".join(ctx.notices)
    participations = max(sum(u in ctx.sample_clients(r) for r in range(1, 5)) for u in ctx.trainers)
    assert 0 < participations < 4
    assert f"epsilon = {epsilon(4.0, participations * 2, 1e-5):.3g} at delta = 1e-05" in notices
    assert "comes from the run's seed" in notices
    for part in ("user-level", "losses and scores", "examples are not sent", "2 noised parts"):
        assert part in notices
    for strategy, text, notice in (
        ("silobn", "clip=1:noise=8", "1 noised parts"),
        ("global-naive", "clip=1", "no differential privacy"),
        ("local", "clip=1:noise=1", "send nothing but losses"),
        ("global-naive", "clip=1:noise=1:secure=true", "observer of the sums only"),
    ):
        assert notice in " ".join(build_context(with_privacy(small(strategy), text)).notices)
    assert privacy_notices(build_context(small())) == []


@pytest.mark.parametrize(
    ("strategy", "text", "match"),
    [
        ("centralized", "clip=1", "one place"),
        ("global-recalibrated", "clip=1", "syncs_statistics"),
        ("fedtan", "clip=1", "syncs_first_batch"),
        ("fedap", "secure=true", "needs each client|sends more"),
        ("divergence-pooled", "secure=true", "needs each client"),
        ("global-robust", "secure=true", "needs each client"),
    ],
)
def test_build_context_rejects_uncovered_strategies(strategy, text, match, small):
    with pytest.raises(UserError, match=match):
        build_context(with_privacy(small(strategy), text))


def test_build_context_rejects_secure_sum_of_one_client(small):
    with pytest.raises(UserError, match="at least 2"):
        build_context(with_privacy(small(clients_per_round=1), "secure=true"))


def test_epsilon_without_opacus_names_the_extra(small, monkeypatch):
    monkeypatch.setitem(sys.modules, "opacus.accountants.analysis", None)
    with pytest.raises(UserError, match=r"fedbn\[privacy\]"):
        epsilon(1.0, 1, 1e-5)


# Secure sums

vectors = st.integers(2, 6).flatmap(
    lambda clients: hnp.arrays(np.float64, (clients, 5), elements=st.floats(-1e4, 1e4, allow_subnormal=False))
)


@given(vectors, st.integers(0, 2**31), st.integers(12, 32))
def test_masked_messages_sum_to_encoded_values(values, seed, bits):
    clients = [3 * i + 1 for i in range(len(values))]
    plain = [encode(torch.from_numpy(v), bits, len(values)) for v in values]
    masked = [p + pairwise_mask(c, clients, 5, seed, 1) for p, c in zip(plain, clients)]
    assert np.array_equal(modular_sum(masked), modular_sum(plain))
    decoded = decode(modular_sum(masked), bits).numpy()
    assert np.abs(decoded - values.sum(0)).max() <= len(values) * 0.5 / 2**bits + 1e-10


@given(vectors)
def test_encoded_sums_give_pooled_moments(values):
    rows = [torch.from_numpy(v - values[0, 0])[:, None] for v in values]  # shifted, as clients do
    expected = pooled([Moments.of(r) for r in rows])
    sums = [torch.stack([torch.tensor(len(r)).double(), r.sum(), (r**2).sum()]) for r in rows]
    n, first, second = decode(modular_sum([encode(s, 16, len(rows)) for s in sums]), 16)
    assert n == expected.n
    step = len(rows) / 2**17
    assert float(first / n) == pytest.approx(float(expected.mean), abs=step + 1e-6)
    assert float(second / n - (first / n) ** 2) == pytest.approx(float(expected.variance()), rel=1e-6, abs=1e-2)


def test_single_masked_message_is_uniform():
    from scipy.stats import chisquare, kstest

    for value in (0.0, 1234.5):
        words = encode(torch.full((4096,), value), 24, 3) + pairwise_mask(1, [0, 1, 2], 4096, 7, 1)
        assert kstest(words / 2.0**64, "uniform").pvalue > 0.001
        for shift in (0, 28, 56):  # low, middle and high bytes
            counts = np.bincount(((words >> np.uint64(shift)) & np.uint64(255)).astype(int), minlength=256)
            assert chisquare(counts).pvalue > 0.001
    assert not np.array_equal(pairwise_mask(1, [0, 1, 2], 8, 7, 1), pairwise_mask(1, [0, 1, 2], 8, 7, 2))


@pytest.mark.parametrize("value", [math.nan, math.inf, 2.0**40])
def test_encode_rejects_numbers_out_of_range(value):
    with pytest.raises(UserError, match="does not fit"):
        encode(torch.tensor([value]), 24, 4)


def test_encode_largest_numbers_do_not_overflow():
    limit = 2.0 ** (62 - 24) / 4
    for value in (limit, -limit):
        assert float(decode(modular_sum([encode(torch.tensor([value]), 24, 4)] * 4), 24)) == 4 * value
    with pytest.raises(UserError, match="of 4 clients with 24 fractional bits"):
        encode(torch.tensor([1.01 * limit]), 24, 4)


@pytest.mark.parametrize(
    "strategy", mostly_slow(["global-pooled", "global-naive", "fedbn", "fedbn-seeded", "silobn"], "global-pooled")
)
def test_secure_sums_match_plain_aggregation(strategy, small):
    plain = replace(small(strategy, rounds=1, clients_per_round=4), partition="linear:clients=6").resolved()
    ctx = build_context(plain)
    assert len({len(ctx.training_data(u)) for u in ctx.sample_clients(1)}) > 1  # so that weights matter
    expected, secure = federate(plain), federate(with_privacy(plain, "secure=true"))
    for key, value in expected.server.state.items():
        assert torch.allclose(secure.server.state[key], value, atol=2e-6, rtol=2e-6), key
    assert secure.server.client_statistics == {}  # the server has no statistics of single clients


def test_unmask_mean_keeps_variances_nonnegative(small):
    run = with_privacy(small("global-pooled", rounds=1, clients_per_round=2), "secure=true:bits=8")
    ctx, start = build_context(run), build_context(run).initial_server_state()
    (mean, var), *_ = statistics_pairs(ctx.ownership)
    constant = start | {mean: torch.full_like(start[mean], 0.3), var: torch.zeros_like(start[var])}
    messages = [mask_update(ctx, Update(u, constant, 1, 0.0), start, FIRST) for u in ctx.sample_clients(1)]
    state = unmask_mean(ctx, messages, start, 1).state
    assert (state[var] >= 0).all()
    assert torch.allclose(state[mean], constant[mean], atol=2**-8)


@pytest.mark.parametrize(("weight", "last", "valid"), [(1, 1, True), (0, 1, False), (-1, 1, False), (1, 2**62, False)])
def test_unmask_mean_rejects_invalid_sum(weight, last, valid, small):
    """The weight of the sum is not positive, or a new variance is infinite."""
    ctx = build_context(with_privacy(small("global-pooled"), "secure=true"))
    sent = {k: v * 0 + 1e30 if k.endswith("var") else v for k, v in ctx.initial_server_state().items()}
    words = torch.zeros(message_size(ctx), dtype=torch.int64)
    first = words.clone()
    first[0], first[-1] = weight, last
    messages = [Update(u, {MASKED: first if u == ctx.trainers[0] else words}, 1, 0.0) for u in ctx.trainers]
    with nullcontext() if valid else pytest.raises(UserError, match="secure sum of round 1 is invalid"):
        unmask_mean(ctx, messages, sent, 1)


def test_unmask_mean_rejects_missing_client(small):
    ctx = build_context(with_privacy(small("fedbn"), "secure=true"))
    messages = [mask_update(ctx, trained(ctx, u)[0], ctx.initial_server_state(), FIRST) for u in ctx.trainers[:-1]]
    assert messages[0].state.keys() == {MASKED}
    with pytest.raises(UserError, match="did not reply"):
        Server(ctx.initial_server_state(), ctx.initial_server_state()).advance(ctx, messages, 1)


# Contents of messages


def record_messages(run):
    """Context, all replies of the clients as (message type, user, content), and the grid of a run."""
    ctx, replies = build_context(run), []

    def record(message, context):
        reply = client_app(message, context)
        replies.append((message.metadata.message_type, context.node_config["partition-id"], reply.content))
        return reply

    app = ClientApp()
    app.__class__ = type("Recorder", (ClientApp,), {"__call__": lambda self, m, c: record(m, c)})
    grid = InProcessGrid(app, len(ctx.population.users), {"run": run.to_json()})
    with task_identity(grid.run.run_id):
        run_rounds(grid, run, Listener())
    return ctx, replies, grid


QUICK = {"fedbn-seeded", "silobn", "mtfl"}


@pytest.mark.parametrize("name", mostly_slow(strategies(), *QUICK))
def test_local_entries_are_in_no_message(name, small):
    """Neither names nor bytes of local entries are in any reply of a client."""
    ctx, replies, grid = record_messages(small(name, rounds=1, eval_every=1))
    local = set(ctx.ownership.keys(LOCAL))
    assert replies
    for kind, user, content in replies:
        assert all(isinstance(record, ArrayRecord) or n in {"metrics", "info"} for n, record in content.items()), kind
        arrays = [(n, k, a) for n, r in content.array_records.items() for k, a in r.items()]
        sent = {k for n, k, _ in arrays if n == "arrays"}
        assert sent <= set(ctx.ownership.travels)
        client_state = grid.partition_context(user).state.array_records.get(f"client-state-{user}", ArrayRecord())
        for key in local & client_state.keys():
            secret, initial = client_state[key].numpy(), ctx.initial[key].numpy()
            # Fewer values cannot be identified by their bytes; equal ones were never trained.
            if secret.size >= 4 and not np.array_equal(secret, initial):
                assert not any(secret.tobytes() in a.data for _, _, a in arrays), (name, kind, key)


@pytest.mark.parametrize("text", ["clip=0.5:noise=0.5", "secure=true"])
def test_protected_message_contains_no_client_values(text, small):
    ctx, replies, _ = record_messages(with_privacy(small("global-pooled", rounds=1), text))
    messages = {user: content for kind, user, content in replies if kind == "train"}
    for user in ctx.trainers:
        update, _ = trained(ctx, user)
        sent = b"".join(a.data for a in messages[user].array_records["arrays"].values())
        for key, value in update.state.items():
            if value.numel() >= 4:
                assert value.numpy().tobytes() not in sent, key
        assert messages[user].metric_records["metrics"]["num-examples"] == 1
        assert isinstance(messages[user], RecordDict)

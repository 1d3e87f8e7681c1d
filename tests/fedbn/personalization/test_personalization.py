"""Methods of personalization: each with every kind of norm ownership, and what makes each what it is."""

from __future__ import annotations

import pytest
import torch

from fedbn.errors import UserError
from fedbn.federation.client import METHOD_STATE, client_round
from fedbn.federation.loop import federate
from fedbn.federation.setup import build_context
from fedbn.nn.roles import Role
from fedbn.personalization.base import personalizations
from fedbn.personalization.treatment import treatment
from fedbn.strategies.base import Progress
from simulations.engines.execute import execute
from tests.helpers import same

METHODS = list(personalizations())
NORMS = ["fedbn", *(pytest.param(n, marks=pytest.mark.slow) for n in ("global-naive", "silobn", "groupnorm"))]


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", METHODS)
def test_every_pair_runs_the_same_under_flower(name, norm, small):
    run = small(f"{norm}+{name}", clients_per_round=3)
    a, b = federate(run), execute(run, "grid")
    assert same(a.server.state, b.server.state)
    assert same(a.server.broadcast, b.server.broadcast)
    assert a.client_states.keys() == b.client_states.keys()
    assert all(same(a.client_states[u], b.client_states[u]) for u in a.client_states)
    assert a.scores == b.scores
    assert a.curve == b.curve


@pytest.mark.parametrize("name", METHODS)
def test_what_a_method_keeps_aside_never_travels(name, small):
    ctx = build_context(small(f"fedbn+{name}"))
    update, kept = client_round(ctx, ctx.trainers[0], ctx.start(), None, Progress(1, 2))
    assert list(update.state) == ctx.ownership.travels
    assert not any(k.startswith(METHOD_STATE) for k in update.state)
    for key in kept:
        assert key in ctx.ownership.retained or key.startswith(METHOD_STATE)


def test_a_treatment_reads_as_it_is_written():
    assert str(treatment("fedbn+ditto:lam=0.5")) == "fedbn+ditto:lam=0.5"
    assert str(treatment("groupnorm:groups=8+ditto:lam=0.1")) == "groupnorm+ditto"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("fedbn+dito", "personalization 'dito'.*ditto"),
        ("fedbn+ditto:lamb=1", "option of personalization 'ditto' 'lamb'.*lam"),
        ("fedbn+ditto:lam=-1", "lam must be 0 or more"),
        ("fedbn+fedprox:mu=-1", "mu must be 0 or more"),
        ("fedbn+apfl:alpha=2", "alpha must be between 0 and 1"),
    ],
)
def test_mistakes_are_named(text, message):
    with pytest.raises(UserError, match=message):
        treatment(text)


@pytest.mark.parametrize("method", ["ditto", "apfl", "finetune", "fedprox:mu=0"])
def test_the_shared_model_is_trained_as_without_the_method(method, small):
    plain, with_method = federate(small("silobn")), federate(small(f"silobn+{method}"))
    assert same(plain.server.state, with_method.server.state)


def test_fedprox_holds_body_and_head_but_not_the_norm_layers(small):
    ctx = build_context(small("global-naive+fedprox:mu=20", lr=0.05, momentum=0.0, local_epochs=3))
    free = build_context(small("global-naive", lr=0.05, momentum=0.0, local_epochs=3))

    def moved(there, role):
        update, _ = client_round(there, 0, there.start(), None, Progress(1, 2))
        keys = [k for k, r in there.ownership.roles.items() if r is role]
        return sum(float((update.state[k] - there.initial[k]).norm()) for k in keys)

    assert moved(ctx, Role.BODY) < 0.5 * moved(free, Role.BODY)
    assert moved(ctx, Role.HEAD) < 0.5 * moved(free, Role.HEAD)
    assert moved(ctx, Role.AFFINE) > 0.5 * moved(free, Role.AFFINE)


@pytest.mark.parametrize(("method", "role"), [("fedper", Role.HEAD), ("fedrep", Role.HEAD), ("lg-fedavg", Role.BODY)])
def test_the_personal_part_stays_home(method, role, small):
    ctx = build_context(small(f"global-naive+{method}"))
    mine = {k for k, r in ctx.ownership.roles.items() if r is role}
    assert mine
    assert not mine & set(ctx.ownership.travels)


def test_fedrep_trains_the_head_on_the_received_body_first(small, monkeypatch):
    ctx = build_context(small("global-naive+fedrep:head_epochs=2"))
    phases = []

    def spy(model, data, plan, *, only, epochs=None, **_):
        phases.append((set(only), epochs))
        return 0.0, {}

    monkeypatch.setattr("fedbn.federation.client.fit", spy)
    client_round(ctx, 0, ctx.start(), None, Progress(1, 2))
    head = {k for k, r in ctx.ownership.roles.items() if r is Role.HEAD}
    assert phases == [(head, 2), (set(ctx.ownership.roles) - head, None)]


def test_fedbabu_never_trains_the_head_until_it_serves(small):
    run = small("global-naive+fedbabu:epochs=0")
    ctx, out = build_context(run), federate(run)
    for key, role in ctx.ownership.roles.items():
        if role is Role.HEAD:
            assert torch.equal(out.server.state[key], ctx.initial[key])
        elif role is Role.BODY:
            assert not torch.equal(out.server.state[key], ctx.initial[key])
    tuned = federate(small("global-naive+fedbabu:epochs=3:lr=0.05"))
    assert mean_own(build_context(run), tuned) > mean_own(build_context(run), out)


def mean_own(ctx, out):
    values = [
        s.accuracy for u in ctx.population.seen for s in out.scores[u] if (s.row, s.column) == ("own", "aggregated")
    ]
    return sum(values) / len(values)


def test_fine_tuning_for_no_epoch_is_no_fine_tuning(small):
    assert federate(small("fedbn+finetune:epochs=0")).scores == federate(small("fedbn")).scores


def test_fine_tuning_serves_seen_users_alone(small):
    run = small("global-naive+finetune:epochs=2:lr=0.05")
    plain, tuned = federate(small("global-naive")), federate(run)
    population = build_context(run).population
    assert all(plain.scores[u] == tuned.scores[u] for u in population.unseen)
    assert any(plain.scores[u] != tuned.scores[u] for u in population.seen)


def test_ditto_with_a_strong_pull_is_the_received_model_and_without_one_is_free(small):
    options = {"rounds": 1, "momentum": 0.0}
    for lam, near in ((50.0, True), (0.0, False)):
        run = small(f"groupnorm+ditto:lam={lam}", lr=0.01, local_epochs=10, **options)
        ctx, out = build_context(run), federate(run)
        personal = {
            k.removeprefix(METHOD_STATE): v for k, v in out.client_states[0].items() if k.startswith(METHOD_STATE)
        }
        away = sum(float((personal[k] - ctx.initial[k]).norm()) for k in personal)
        shared = sum(float((out.server.state[k] - ctx.initial[k]).norm()) for k in out.server.state)
        assert (away < 0.3 * shared) is near


def test_ditto_without_a_pull_goes_on_from_its_own_model_whatever_the_others_send(small):
    a, b = (
        federate(small("groupnorm+ditto:lam=0", partition="linear:clients=4", weighting=weighting))
        for weighting in ("samples", "uniform")
    )
    assert not same(a.server.state, b.server.state)
    for user, kept in a.client_states.items():
        own = {k: v for k, v in kept.items() if k.startswith(METHOD_STATE)}
        assert own
        assert same(own, {k: b.client_states[user][k] for k in own})


def test_apfl_serves_the_shared_model_at_one_end_and_its_own_at_the_other(small):
    mixed, plain = federate(small("groupnorm+apfl:alpha=0")), federate(small("groupnorm"))
    for user, scores in plain.scores.items():
        assert mixed.scores[user][0] == scores[0]
    run = small("groupnorm+apfl:alpha=1")
    out = federate(run)
    ctx = build_context(run)
    own = {k.removeprefix(METHOD_STATE): v for k, v in out.client_states[0].items() if k.startswith(METHOD_STATE)}
    # With alpha = 1 the mixture is v itself, trained from the first shared model of its client onwards by itself.
    assert any(not torch.allclose(own[k], out.server.state[k]) for k in own)
    served = [s for s in out.scores[0] if (s.row, s.column) == ("own", "aggregated")]
    model = ctx.load(own).eval()
    with torch.no_grad():
        predicted = model(ctx.population.users[0].test.x).argmax(1)
    assert served[0].accuracy == pytest.approx(float((predicted == ctx.population.users[0].test.y).double().mean()))


def test_apfl_personal_step_is_alpha_times_the_gradient_at_the_mixture(small):
    ctx = build_context(small("nonorm+apfl:alpha=0.5", batch_size=10_000, momentum=0.0, lr=0.1))
    update, kept = client_round(ctx, 0, ctx.start(), None, Progress(1, 2))
    model, data = ctx.load(update.state).train(), ctx.training_data(0)
    model.zero_grad()
    torch.nn.functional.cross_entropy(model(data.x), data.y).backward()
    for name, parameter in model.named_parameters():
        expected = update.state[name] - 0.1 * 0.5 * parameter.grad
        torch.testing.assert_close(kept[METHOD_STATE + name], expected, rtol=1e-4, atol=1e-6)
        parameter.grad = None


def test_scaffold_common_variate_is_the_mean_of_all_clients_those_never_drawn_too(small):
    run = small("groupnorm+scaffold", rounds=2, clients_per_round=3)
    ctx, out = build_context(run), federate(run)
    assert 3 < len(out.client_states) < len(ctx.trainers)
    for key, value in out.server.broadcast.items():
        name = key.removeprefix("control/")
        mean = sum(kept[METHOD_STATE + name] for kept in out.client_states.values()) / len(ctx.trainers)
        torch.testing.assert_close(value, mean, rtol=1e-4, atol=1e-6)


def test_scaffold_starts_as_fedavg_and_then_corrects(small):
    one, other = federate(small("groupnorm+scaffold", rounds=1)), federate(small("groupnorm", rounds=1))
    assert same(one.server.state, other.server.state)
    two, plain = federate(small("groupnorm+scaffold")), federate(small("groupnorm"))
    assert not same(two.server.state, plain.server.state)


def test_scaffold_with_one_client_corrects_nothing(small):
    options = {"partition": "iid:clients=1", "rounds": 3, "momentum": 0.0}
    a, b = federate(small("groupnorm+scaffold", **options)), federate(small("groupnorm", **options))
    for key, value in b.server.state.items():
        torch.testing.assert_close(a.server.state[key], value, rtol=1e-4, atol=1e-6)


def test_scaffold_makes_full_batch_clients_step_along_the_common_gradient(small):
    """With one full-batch step and unchanged weights, g_k - c_k + c is c: all clients make the same step."""
    ctx = build_context(small("groupnorm+scaffold", batch_size=10_000, momentum=0.0, lr=0.1))
    start = ctx.start()
    first = {u: client_round(ctx, u, start, None, Progress(1, 2)) for u in ctx.trainers}
    told = ctx.personal.server_broadcast([u for u, _ in first.values()], {}, len(first))
    second = [client_round(ctx, u, start, kept, Progress(2, 2), (), told)[0].state for u, (_, kept) in first.items()]
    body = [k for k, r in ctx.ownership.roles.items() if r in (Role.BODY, Role.HEAD)]
    for state in second[1:]:
        for key in body:
            torch.testing.assert_close(state[key], second[0][key], rtol=1e-4, atol=1e-6)

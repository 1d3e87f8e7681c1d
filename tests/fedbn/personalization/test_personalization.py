"""Personalization methods: combinations with every kind of norm ownership, and defining properties."""

from __future__ import annotations

import pytest
import torch

from fedbn.errors import UserError
from fedbn.federation.client import METHOD_STATE, client_round
from fedbn.federation.server import mean_metric
from fedbn.federation.setup import build_context
from fedbn.nn.roles import Role, with_prefix
from fedbn.personalization.base import Personalization, personalizations
from fedbn.personalization.treatment import treatment
from fedbn.strategies.base import Progress
from tests.helpers import assert_engines_agree, federated, mostly_slow, same, trained

METHODS = list(personalizations())
NORMS = ["fedbn", *(pytest.param(n, marks=pytest.mark.slow) for n in ("global-naive", "silobn", "groupnorm"))]


def one_round(ctx, user=0):
    return client_round(ctx, user, ctx.initial_server_state(), None, Progress(1, 2))


def test_methods_with_equal_options_are_equal():
    for method in (Personalization, *personalizations().values()):
        assert method() == method()
        assert len({method(), method()}) == 1


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", mostly_slow(METHODS, "ditto", "fedrep"))
def test_engines_agree_for_every_norm_and_method(name, norm, small):
    assert_engines_agree(small(f"{norm}+{name}", clients_per_round=3))


@pytest.mark.parametrize("name", METHODS)
def test_method_state_is_never_sent(name, small):
    ctx = build_context(small(f"fedbn+{name}"))
    update, client_state = one_round(ctx, ctx.trainers[0])
    assert list(update.state) == ctx.ownership.travels
    assert not any(k.startswith(METHOD_STATE) for k in update.state)
    for key in client_state:
        assert key in ctx.ownership.retained or key.startswith(METHOD_STATE)


def test_treatment_text_round_trip():
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
def test_treatment_rejects_bad_input(text, message):
    with pytest.raises(UserError, match=message):
        treatment(text)


@pytest.mark.parametrize(
    ("name", "hook"),
    [("serve", "personalized_state"), ("tell", "server_broadcast"), ("personalised_state", "personalized_state")],
)
def test_personalization_rejects_misspelled_and_former_hooks(name, hook):
    with pytest.raises(UserError, match=f"class Own defines '{name}', which Personalization does not use.*'{hook}'"):
        type("Own", (Personalization,), {name: lambda self, trainer: {}})


@pytest.mark.parametrize("method", mostly_slow(["ditto", "apfl", "finetune", "fedprox:mu=0"], "ditto", "finetune"))
def test_method_does_not_change_shared_model(method, small):
    assert same(trained(small("silobn")).server.state, trained(small(f"silobn+{method}")).server.state)


def test_fedprox_regularizes_body_and_head_not_norm_layers(small):
    def distances(name):
        ctx = build_context(small(name, lr=0.05, momentum=0.0, local_epochs=3))
        state, roles = one_round(ctx)[0].state, ctx.ownership.roles
        return [
            sum(float((state[k] - ctx.initial[k]).norm()) for k, r in roles.items() if r is role)
            for role in (Role.BODY, Role.HEAD, Role.AFFINE)
        ]

    body, head, affine = (p / f for p, f in zip(distances("global-naive+fedprox:mu=20"), distances("global-naive")))
    assert body < 0.5
    assert head < 0.5
    assert affine > 0.5


@pytest.mark.parametrize(("method", "role"), [("fedper", Role.HEAD), ("fedrep", Role.HEAD), ("lg-fedavg", Role.BODY)])
def test_personal_part_is_not_shared(method, role, small):
    ctx = build_context(small(f"global-naive+{method}"))
    personal = {k for k, r in ctx.ownership.roles.items() if r is role}
    assert personal
    assert not personal & set(ctx.ownership.travels)


def test_fedrep_trains_head_before_body(small, monkeypatch):
    ctx = build_context(small("global-naive+fedrep:head_epochs=2"))
    phases = []

    def record_fit(model, data, plan, *, only, epochs=None, **_):
        phases.append((set(only), epochs))
        return 0.0, {}

    monkeypatch.setattr("fedbn.federation.client.fit", record_fit)
    one_round(ctx)
    head = {k for k, r in ctx.ownership.roles.items() if r is Role.HEAD}
    assert phases == [(head, 2), (set(ctx.ownership.roles) - head, None)]


@pytest.mark.slow
def test_fedbabu_trains_head_only_for_evaluation(small):
    ctx, out = federated(small("global-naive+fedbabu:epochs=0"))
    for key, role in ctx.ownership.roles.items():
        if role is Role.HEAD:
            assert torch.equal(out.server.state[key], ctx.initial[key])
        elif role is Role.BODY:
            assert not torch.equal(out.server.state[key], ctx.initial[key])
    tuned = trained(small("global-naive+fedbabu:epochs=3:lr=0.05"))
    assert mean_metric(ctx, tuned.scores, unseen=False) > mean_metric(ctx, out.scores, unseen=False)


def test_finetune_with_zero_epochs_changes_nothing(small):
    assert trained(small("fedbn+finetune:epochs=0")).scores == trained(small("fedbn")).scores


def test_finetune_affects_seen_users_only(small):
    ctx, tuned = federated(small("global-naive+finetune:epochs=2:lr=0.05"))
    plain = trained(small("global-naive"))
    assert all(plain.scores[u] == tuned.scores[u] for u in ctx.population.unseen)
    assert any(plain.scores[u] != tuned.scores[u] for u in ctx.population.seen)


@pytest.mark.slow
def test_ditto_penalty_controls_distance_to_received_model(small):
    for lam, near in ((50.0, True), (0.0, False)):
        ctx, out = federated(small(f"groupnorm+ditto:lam={lam}", lr=0.01, local_epochs=10, rounds=1, momentum=0.0))
        personal = with_prefix(out.client_states[1], METHOD_STATE)
        distance = sum(float((personal[k] - ctx.initial[k]).norm()) for k in personal)
        shared = sum(float((out.server.state[k] - ctx.initial[k]).norm()) for k in out.server.state)
        assert (distance < 0.3 * shared) is near


def test_ditto_without_penalty_is_independent_of_others(small):
    name, partition = "groupnorm+ditto:lam=0", "linear:clients=4"
    a, b = (trained(small(name, partition=partition, weighting=weighting)) for weighting in ("samples", "uniform"))
    assert not same(a.server.state, b.server.state)
    for user, client_state in a.client_states.items():
        personal = with_prefix(client_state, METHOD_STATE)
        assert personal
        assert same(personal, with_prefix(b.client_states[user], METHOD_STATE))


def test_apfl_alpha_0_is_shared_and_1_is_personal_model(small):
    mixed, plain = trained(small("groupnorm+apfl:alpha=0")), trained(small("groupnorm"))
    for user, scores in plain.scores.items():
        assert mixed.scores[user][0] == scores[0]
    ctx, out = federated(small("groupnorm+apfl:alpha=1"))
    personal = with_prefix(out.client_states[0], METHOD_STATE)
    # With alpha = 1 the mixture equals v, which is trained independently from the client's first shared model on.
    assert any(not torch.allclose(personal[k], out.server.state[k]) for k in personal)
    scores = [s for s in out.scores[0] if (s.row, s.column) == ("own", "aggregated")]
    test = ctx.population.users[0].test
    with torch.no_grad():
        predicted = ctx.load(personal).eval()(test.x).argmax(1)
    assert scores[0].metrics["accuracy"] == pytest.approx(float((predicted == test.y).double().mean()))


def test_apfl_step_is_alpha_times_mixture_gradient(small):
    ctx = build_context(small("nonorm+apfl:alpha=0.5", batch_size=10_000, momentum=0.0, lr=0.1))
    update, client_state = one_round(ctx)
    mixture = {k: torch.lerp(trained, ctx.initial[k], 0.5) for k, trained in update.state.items()}
    model, data = ctx.load(mixture).train(), ctx.training_data(0)
    model.zero_grad()
    torch.nn.functional.cross_entropy(model(data.x), data.y).backward()
    for name, parameter in model.named_parameters():
        expected = ctx.initial[name] - 0.1 * 0.5 * parameter.grad
        torch.testing.assert_close(client_state[METHOD_STATE + name], expected, rtol=1e-4, atol=1e-6)
        parameter.grad = None


def test_scaffold_server_variate_is_mean_over_all_clients(small):
    ctx, out = federated(small("groupnorm+scaffold", rounds=2, clients_per_round=3))
    assert 3 < len(out.client_states) < len(ctx.trainers)
    for key, value in out.server.broadcast.items():
        name = key.removeprefix("control/")
        mean = sum(s[METHOD_STATE + name] for s in out.client_states.values()) / len(ctx.trainers)
        torch.testing.assert_close(value, mean, rtol=1e-4, atol=1e-6)


def test_scaffold_equals_fedavg_in_first_round_only(small):
    for rounds, equal in ((1, True), (2, False)):
        a, b = (trained(small(name, rounds=rounds)).server.state for name in ("groupnorm+scaffold", "groupnorm"))
        assert same(a, b) is equal


def test_scaffold_with_one_client_equals_fedavg(small):
    options = {"partition": "iid:clients=1", "rounds": 3, "momentum": 0.0}
    a, b = (trained(small(name, **options)).server.state for name in ("groupnorm+scaffold", "groupnorm"))
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_scaffold_full_batch_clients_take_equal_steps(small):
    """With one full-batch step and unchanged weights, g_k - c_k + c equals c for all clients."""
    ctx = build_context(small("groupnorm+scaffold", batch_size=10_000, momentum=0.0, lr=0.1))
    start = ctx.initial_server_state()
    first = {u: client_round(ctx, u, start, None, Progress(1, 2)) for u in ctx.trainers}
    broadcast = ctx.personal.server_broadcast([u for u, _ in first.values()], {}, len(first))
    second = [client_round(ctx, u, start, s, Progress(2, 2), (), broadcast)[0].state for u, (_, s) in first.items()]
    body = [k for k, r in ctx.ownership.roles.items() if r in (Role.BODY, Role.HEAD)]
    for state in second[1:]:
        torch.testing.assert_close(*({k: s[k] for k in body} for s in (state, second[0])), rtol=1e-4, atol=1e-6)

"""Methods of personalization: each with every kind of norm ownership, and what makes each what it is."""

from __future__ import annotations

import pytest
import torch

from fedbn.errors import UserError
from fedbn.federation.client import ASIDE, client_round
from fedbn.federation.loop import federate
from fedbn.federation.setup import setting
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
    assert same(a.server.told, b.server.told)
    assert a.kept.keys() == b.kept.keys()
    assert all(same(a.kept[u], b.kept[u]) for u in a.kept)
    assert a.scores == b.scores
    assert a.curve == b.curve


@pytest.mark.parametrize("name", METHODS)
def test_what_a_method_keeps_aside_never_travels(name, small):
    here = setting(small(f"fedbn+{name}"))
    update, kept = client_round(here, here.trainers[0], here.start(), None, Progress(1, 2))
    assert list(update.state) == here.ownership.travels
    assert not any(k.startswith(ASIDE) for k in update.state)
    for key in kept:
        assert key in here.ownership.kept or key.startswith(ASIDE)


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
    here = setting(small("global-naive+fedprox:mu=20", lr=0.05, momentum=0.0, local_epochs=3))
    free = setting(small("global-naive", lr=0.05, momentum=0.0, local_epochs=3))

    def moved(there, role):
        update, _ = client_round(there, 0, there.start(), None, Progress(1, 2))
        keys = [k for k, r in there.ownership.roles.items() if r is role]
        return sum(float((update.state[k] - there.initial[k]).norm()) for k in keys)

    assert moved(here, Role.BODY) < 0.5 * moved(free, Role.BODY)
    assert moved(here, Role.HEAD) < 0.5 * moved(free, Role.HEAD)
    assert moved(here, Role.AFFINE) > 0.5 * moved(free, Role.AFFINE)


@pytest.mark.parametrize(("method", "role"), [("fedper", Role.HEAD), ("fedrep", Role.HEAD), ("lg-fedavg", Role.BODY)])
def test_the_personal_part_stays_home(method, role, small):
    here = setting(small(f"global-naive+{method}"))
    mine = {k for k, r in here.ownership.roles.items() if r is role}
    assert mine
    assert not mine & set(here.ownership.travels)


def test_fedrep_trains_the_head_on_the_received_body_first(small, monkeypatch):
    here = setting(small("global-naive+fedrep:head_epochs=2"))
    phases = []

    def spy(model, data, plan, *, only, epochs=None, **_):
        phases.append((set(only), epochs))
        return 0.0, {}

    monkeypatch.setattr("fedbn.federation.client.fit", spy)
    client_round(here, 0, here.start(), None, Progress(1, 2))
    head = {k for k, r in here.ownership.roles.items() if r is Role.HEAD}
    assert phases == [(head, 2), (set(here.ownership.roles) - head, None)]


def test_fedbabu_never_trains_the_head_until_it_serves(small):
    run = small("global-naive+fedbabu:epochs=0")
    here, out = setting(run), federate(run)
    for key, role in here.ownership.roles.items():
        if role is Role.HEAD:
            assert torch.equal(out.server.state[key], here.initial[key])
        elif role is Role.BODY:
            assert not torch.equal(out.server.state[key], here.initial[key])
    tuned = federate(small("global-naive+fedbabu:epochs=3:lr=0.05"))
    assert mean_own(setting(run), tuned) > mean_own(setting(run), out)


def mean_own(here, out):
    values = [
        s.accuracy for u in here.population.seen for s in out.scores[u] if (s.row, s.column) == ("own", "aggregated")
    ]
    return sum(values) / len(values)


def test_fine_tuning_for_no_epoch_is_no_fine_tuning(small):
    assert federate(small("fedbn+finetune:epochs=0")).scores == federate(small("fedbn")).scores


def test_fine_tuning_serves_seen_users_alone(small):
    run = small("global-naive+finetune:epochs=2:lr=0.05")
    plain, tuned = federate(small("global-naive")), federate(run)
    people = setting(run).population
    assert all(plain.scores[u] == tuned.scores[u] for u in people.unseen)
    assert any(plain.scores[u] != tuned.scores[u] for u in people.seen)


def test_ditto_with_a_strong_pull_is_the_received_model_and_without_one_is_free(small):
    options = {"rounds": 1, "momentum": 0.0}
    for lam, near in ((50.0, True), (0.0, False)):
        run = small(f"groupnorm+ditto:lam={lam}", lr=0.01, local_epochs=10, **options)
        here, out = setting(run), federate(run)
        personal = {k.removeprefix(ASIDE): v for k, v in out.kept[0].items() if k.startswith(ASIDE)}
        away = sum(float((personal[k] - here.initial[k]).norm()) for k in personal)
        shared = sum(float((out.server.state[k] - here.initial[k]).norm()) for k in out.server.state)
        assert (away < 0.3 * shared) is near


def test_ditto_without_a_pull_goes_on_from_its_own_model_whatever_the_others_send(small):
    a, b = (
        federate(small("groupnorm+ditto:lam=0", partition="linear:clients=4", weighting=weighting))
        for weighting in ("samples", "uniform")
    )
    assert not same(a.server.state, b.server.state)
    for user, kept in a.kept.items():
        own = {k: v for k, v in kept.items() if k.startswith(ASIDE)}
        assert own
        assert same(own, {k: b.kept[user][k] for k in own})


def test_apfl_serves_the_shared_model_at_one_end_and_its_own_at_the_other(small):
    mixed, plain = federate(small("groupnorm+apfl:alpha=0")), federate(small("groupnorm"))
    for user, scores in plain.scores.items():
        assert mixed.scores[user][0] == scores[0]
    run = small("groupnorm+apfl:alpha=1")
    out = federate(run)
    here = setting(run)
    own = {k.removeprefix(ASIDE): v for k, v in out.kept[0].items() if k.startswith(ASIDE)}
    # With alpha = 1 the mixture is v itself, trained from the first shared model of its client onwards by itself.
    assert any(not torch.allclose(own[k], out.server.state[k]) for k in own)
    served = [s for s in out.scores[0] if (s.row, s.column) == ("own", "aggregated")]
    model = here.load(own).eval()
    with torch.no_grad():
        predicted = model(here.population.users[0].test.x).argmax(1)
    assert served[0].accuracy == pytest.approx(float((predicted == here.population.users[0].test.y).double().mean()))


def test_apfl_personal_step_is_alpha_times_the_gradient_at_the_mixture(small):
    here = setting(small("nonorm+apfl:alpha=0.5", batch_size=10_000, momentum=0.0, lr=0.1))
    update, kept = client_round(here, 0, here.start(), None, Progress(1, 2))
    model, data = here.load(update.state).train(), here.training_data(0)
    model.zero_grad()
    torch.nn.functional.cross_entropy(model(data.x), data.y).backward()
    for name, parameter in model.named_parameters():
        expected = update.state[name] - 0.1 * 0.5 * parameter.grad
        torch.testing.assert_close(kept[ASIDE + name], expected, rtol=1e-4, atol=1e-6)
        parameter.grad = None


def test_scaffold_common_variate_is_the_mean_of_all_clients_those_never_drawn_too(small):
    run = small("groupnorm+scaffold", rounds=2, clients_per_round=3)
    here, out = setting(run), federate(run)
    assert 3 < len(out.kept) < len(here.trainers)
    for key, value in out.server.told.items():
        name = key.removeprefix("control/")
        mean = sum(kept[ASIDE + name] for kept in out.kept.values()) / len(here.trainers)
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
    here = setting(small("groupnorm+scaffold", batch_size=10_000, momentum=0.0, lr=0.1))
    start = here.start()
    first = {u: client_round(here, u, start, None, Progress(1, 2)) for u in here.trainers}
    told = here.personal.tell([u for u, _ in first.values()], {}, len(first))
    second = [client_round(here, u, start, kept, Progress(2, 2), (), told)[0].state for u, (_, kept) in first.items()]
    body = [k for k, r in here.ownership.roles.items() if r in (Role.BODY, Role.HEAD)]
    for state in second[1:]:
        for key in body:
            torch.testing.assert_close(state[key], second[0][key], rtol=1e-4, atol=1e-6)

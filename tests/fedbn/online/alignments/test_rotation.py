from dataclasses import replace

import pytest
import torch

from fedbn.errors import UserError
from fedbn.online import fit_alignment
from fedbn.online.alignments import quaternions as so3
from fedbn.online.alignments.aligner import Aligner
from fedbn.online.alignments.base import parse_alignment
from fedbn.online.alignments.rotation_search import OTHERWISE, RotationSearch
from tests.fedbn.online.alignments.data import CLASSES, GRAVITY, TRIPLES, angle, clients, turn, windows

LIKE = torch.zeros(1, dtype=torch.float64)
ZERO = torch.zeros(1, dtype=torch.long)
IDENTITY = torch.tensor([1.0, 0, 0, 0])


@pytest.fixture(scope="module")
def aligner():
    return fit_alignment("rotation", clients(), CLASSES, TRIPLES)


def inverse(q):
    return q * torch.tensor([1.0, -1, -1, -1]).to(q)


def estimated(aligner, x):
    return aligner.follow(x, LIKE)["align_value"][0]


def flat(aligner):
    """Without a preference for small rotations."""
    return replace(aligner, prior=replace(aligner.prior, spread=torch.full((3,), torch.inf, dtype=torch.float64)))


def test_seen_clients_are_turned_onto_their_mean(aligner):
    turned = torch.nn.functional.normalize(aligner.prior.mean[:, :3], dim=1)
    # The mean posture is known up to a rotation that all clients share.
    truth = torch.nn.functional.normalize(GRAVITY, dim=1).double()
    assert torch.allclose(turned @ turned.T, truth @ truth.T, atol=0.02)
    assert float(aligner.prior.spread[0].sqrt()) == pytest.approx(0.2, rel=0.5)
    raw = fit_alignment("rotation", clients(spread=0.0), CLASSES, TRIPLES)
    assert aligner.prior.cov[0].trace() < 1.2 * raw.prior.cov[0].trace()


@pytest.mark.parametrize("vector", [(0.5, 0, 0), (0, 0.4, -0.5), (-0.3, 0.3, 0.3)])
def test_rotation_recovers_a_known_rotation_within_three_degrees(vector, aligner):
    q = so3.from_vector(torch.tensor(vector))
    found = estimated(flat(aligner), windows(96, 1, q=q)[0])
    straight = estimated(flat(aligner), windows(96, 1)[0])
    assert angle(found, so3.multiply(straight, inverse(q).double())) < 0.1
    assert angle(found, inverse(q)) < 3 + angle(straight, IDENTITY)


@pytest.mark.parametrize(
    ("degrees", "axis"), [(90.0, (1.0, 0, 0)), (90.0, (0, 0, 1.0)), (180.0, (0, 1.0, 0)), (180.0, (0.6, -0.6, 0.53))]
)
def test_rotation_finds_a_large_rotation_despite_its_prior(degrees, axis, aligner):
    q = so3.from_vector(torch.tensor(axis).double() * degrees * torch.pi / 180)
    assert angle(estimated(aligner, windows(96, 1, q=q)[0]), inverse(q)) < 10


def test_search_starts_all_over_the_rotations(aligner):
    starts = aligner.estimator.starts.double()
    assert torch.equal(starts[0], IDENTITY.double())
    assert len(starts) == 24
    draw = torch.Generator().manual_seed(0)
    some = torch.nn.functional.normalize(torch.randn(1000, 4, generator=draw).double(), dim=1)
    nearest = (some @ starts.T).abs().max(1).values.clamp(max=1)
    assert 55 < float(2 * nearest.acos().max().rad2deg()) < 63
    axis = torch.nn.functional.normalize(aligner.prior.mean[:, :3].mean(0), dim=0)
    assert float((so3.to_matrix(starts) @ axis - axis).norm(dim=1).lt(1e-9).sum()) == 4


def test_prior_is_a_mixture_of_near_and_of_any_rotations(aligner):
    search = RotationSearch(aligner.prior, 8.0)
    vectors = torch.tensor([[0.0, 0, 0], [0.2, 0.1, 0], [0, 1.5, 0], [0, 0, -3.0]]).double()
    z, n = aligner.measure(windows(4, 1)[0])[0][None], torch.ones(1, 4).double()
    q = so3.from_vector(vectors)[None]
    log_prior = search.objective(n, z, q) - search.likelihood(n, z, q)
    near = torch.distributions.MultivariateNormal(torch.zeros(3).double(), aligner.prior.spread.diag())
    density = (1 - OTHERWISE) * near.log_prob(vectors).exp() + OTHERWISE / (8 * torch.pi**2)
    assert torch.allclose(log_prior[0], (density / density[0]).log())


def test_refine_is_equivariant(aligner):
    search = RotationSearch(flat(aligner).prior, 8.0)
    q = so3.from_vector(torch.tensor([0.4, -0.8, 0.3], dtype=torch.float64))
    z = aligner.measure(windows(48, 2)[0])[0][None]
    turned = torch.cat([z[..., :3] @ so3.to_matrix(q).T, z[..., 3:]], -1)
    n, starts = torch.ones(1, 48, dtype=torch.float64), search.starts[None]
    found = search.refine(n, z, starts)
    other = search.refine(n, turned, so3.multiply(starts, inverse(q)))
    assert torch.allclose(so3.to_matrix(other), so3.to_matrix(found) @ so3.to_matrix(q).T, atol=1e-9)
    assert torch.allclose(search.objective(n, z, found), search.objective(n, turned, other))


def test_refine_never_lowers_the_objective_much(aligner):
    search = RotationSearch(aligner.prior, 8.0)
    z = aligner.measure(windows(48, 2, q=so3.from_vector(torch.tensor([0.5, 0.0, 0.0])))[0])[0][None]
    n = torch.ones(1, 48, dtype=torch.float64)
    before, after = (search.objective(n, z, q) for q in (search.starts[None], search.refine(n, z, search.starts[None])))
    assert (after >= before).all()


def test_refine_ends_where_the_gradient_of_the_objective_is_zero(aligner):
    search = RotationSearch(aligner.prior, 8.0)
    z = aligner.measure(windows(96, 2, q=so3.from_vector(torch.tensor([0.2, 0.1, 0.0])))[0])[0][None]
    n = torch.ones(1, 96, dtype=torch.float64)
    q = IDENTITY.double()[None, None]
    for _ in range(5):
        q = search.refine(n, z, q)
    # A tenth of a degree in any direction lowers it.
    for axis in torch.eye(3, dtype=torch.float64):
        for sign in (-1, 1):
            near = so3.multiply(so3.from_vector(sign * 2e-3 * axis), q)
            assert search.objective(n, z, near) < search.objective(n, z, q)


def test_rotation_is_the_identity_if_classes_have_no_gravity():
    users = clients(gravity=torch.zeros(CLASSES, 3))
    aligner = fit_alignment("rotation", users, CLASSES, TRIPLES)
    x, _ = windows(96, 3, gravity=torch.zeros(CLASSES, 3))
    assert torch.equal(estimated(aligner, x), IDENTITY.double())


@pytest.mark.parametrize("label", range(CLASSES))
def test_rotation_stays_near_the_identity_on_one_class(label, aligner):
    x, _ = windows(96, 4, labels=torch.full((96,), label))
    own = estimated(aligner, windows(96, 4)[0])
    assert angle(estimated(aligner, x), IDENTITY) < 5 + angle(own, IDENTITY)


def test_rotation_of_a_recorded_stream_is_that_of_the_windows_one_by_one(aligner):
    x, _ = windows(30, 5, q=so3.from_vector(torch.tensor([0.5, 0.2, 0.0])))
    z = aligner.measure(x)[0][None]
    n = torch.ones(1, 30, dtype=torch.float64)
    rows = aligner.start(LIKE)
    for t in range(30):
        aligner.learn(rows, ZERO, z[0, t : t + 1], torch.ones(1, dtype=torch.bool), torch.ones(1, dtype=torch.float64))
    recursive, batch = rows["align_value"][0], aligner.estimator((n, z), IDENTITY.double()[None])[0]
    assert angle(recursive, batch) < 0.2


def test_rotation_of_a_long_stream_needs_few_cells(aligner):
    x, _ = windows(240, 6, q=so3.from_vector(torch.tensor([0.5, 0.2, 0.0])))
    exact = replace(aligner, alignment=parse_alignment("rotation:cells=240"))
    assert angle(estimated(aligner, x), estimated(exact, x)) < 0.5


def test_apply_turns_every_sensor(aligner):
    q = so3.from_vector(torch.tensor([[0.3, 0.1, -0.4], [0.0, 0.0, 0.0]]))
    x, _ = windows(2, 7)
    out = aligner.alignment.apply(q, x, TRIPLES)
    assert torch.allclose(out[:1], turn(x[:1], q[0]), atol=1e-6)
    assert torch.equal(out[1], x[1])


def test_usable_excludes_saturated_and_weightless_windows(aligner):
    x, _ = windows(4, 8)
    x[1, 0] = torch.linspace(0, 4, 24).clamp_max(2.0)
    x[2, :3] = 0.01 * x[2, :3]
    assert aligner.measure(x)[1].tolist() == [True, False, False, True]


def test_windows_that_are_not_usable_do_not_change_the_estimate(aligner):
    x, _ = windows(60, 9)
    bad = x.clone()
    bad[:, 0] = torch.linspace(-4, 4, 24).clamp(-2.0, 2.0)
    rows, other = aligner.follow(x, LIKE), aligner.follow(torch.cat([bad, x]), LIKE)
    assert torch.equal(rows["align_n"], other["align_n"])
    assert torch.equal(rows["align_value"], other["align_value"])
    assert other["align_count"].tolist() == [[60, 60]]


def test_windows_in_another_unit_are_refused(aligner):
    with pytest.raises(UserError, match=r"times the seen clients' gravity: use one unit .*9.81"):
        aligner.measure(9.81 * windows(4, 8)[0])
    users = clients()
    users[2] = (9.81 * users[2][0], users[2][1])
    with pytest.raises(UserError, match="use one unit"):
        fit_alignment("rotation", users, CLASSES, TRIPLES)


def test_memory_forgets_an_earlier_orientation():
    q = so3.from_vector(torch.tensor([0.0, 0.5, 0.5]))
    x = torch.cat([windows(240, 10)[0], windows(96, 11, q=q)[0]])
    users = clients()
    short = flat(fit_alignment("rotation:memory=24:recent=0", users, CLASSES, TRIPLES))
    long = flat(fit_alignment("rotation:recent=0", users, CLASSES, TRIPLES))
    truth = estimated(short, x[240:])
    assert angle(estimated(short, x), truth) < 5 < angle(estimated(long, x), truth)


@pytest.mark.parametrize("axis", [(1.0, 0, 0), (0, 1.0, 0), (0, 0, -1.0)])
def test_rotation_follows_a_turn_in_mid_stream_within_twenty_windows(axis, aligner):
    q = so3.from_vector(torch.tensor(axis).double() * torch.pi / 2)
    x = torch.cat([windows(96, 10)[0], windows(20, 11, q=q)[0]])
    assert angle(estimated(aligner, x), inverse(q)) < 12
    never = replace(aligner, alignment=parse_alignment("rotation:recent=0"))
    assert angle(estimated(never, x), inverse(q)) > 60


@pytest.mark.parametrize("labels", [None, torch.arange(120) // 60, torch.arange(120) // 40 % 2 + 2])
def test_rotation_starts_again_only_after_a_change(labels, aligner):
    x, _ = windows(120, 12, labels=labels)
    assert float(aligner.follow(x, LIKE)["align_n"].sum()) == 120


def test_restart_is_of_one_user_only(aligner):
    q = so3.from_vector(torch.tensor([0.0, 1.6, 0.0]))
    ann, bob = (torch.cat([windows(60, 13)[0], windows(20, 14, q=turned)[0]]) for turned in (q, None))
    rows = {name: table.repeat(2, *[1] * (table.dim() - 1)) for name, table in aligner.start(LIKE).items()}
    slots, ones = torch.arange(2), torch.ones(2, dtype=torch.float64)
    for both in zip(ann, bob, strict=True):
        z, usable = aligner.measure(torch.stack(both))
        aligner.learn(rows, slots, z, usable, ones)
    assert rows["align_n"].sum(1).tolist()[1] == 80 > rows["align_n"].sum(1).tolist()[0]
    for user, x in enumerate((ann, bob)):
        alone = aligner.start(LIKE)
        for t in range(80):
            z, usable = aligner.measure(x[t : t + 1])
            aligner.learn(alone, ZERO, z, usable, ones[:1])
        assert torch.allclose(alone["align_value"][0], rows["align_value"][user])
    assert torch.equal(rows["align_recent"][0], aligner.measure(ann[-16:])[0])


def test_rotation_needs_triples_and_windows_of_sensors():
    with pytest.raises(UserError, match="set triples of its Population"):
        fit_alignment("rotation", clients(), CLASSES)
    with pytest.raises(UserError, match=r"not on examples of shape \[3, 8, 8\]"):
        fit_alignment("rotation", [(torch.zeros(4, 3, 8, 8), torch.zeros(4, dtype=torch.long))], 2, TRIPLES)


def test_classes_that_nobody_has_are_ignored(aligner):
    more = fit_alignment("rotation", clients(), CLASSES + 2, TRIPLES)
    x, _ = windows(60, 12, q=so3.from_vector(torch.tensor([0.3, 0.0, 0.2])))
    assert more.prior.seen.tolist() == [True] * CLASSES + [False] * 2
    assert angle(estimated(more, x), estimated(aligner, x)) < 0.01


def test_report_has_the_angle_in_degrees(aligner):
    rows = aligner.start(LIKE)
    rows["align_value"][0] = so3.from_vector(torch.tensor([0.0, 0.0, torch.pi / 6]))
    report = Aligner.report(aligner, rows, 0)
    assert report["degrees"] == pytest.approx(30)
    assert report["axis"] == [0, 0, 1]

"""Laws of every alignment, on synthetic data of its kind with known transformations."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch

from fedbn.errors import UserError
from fedbn.online import fit_alignment
from fedbn.online.alignments import quaternions as so3
from fedbn.online.alignments.base import AlignmentPrior, alignments
from fedbn.online.alignments.evidence import FOR
from fedbn.online.alignments.states import merge_states
from fedbn.online.sums import LabeledWindows, add_sums
from tests.fedbn.online.alignments import data

LIKE = torch.zeros(1, dtype=torch.float64)
WINDOWS = 60


def images(n, seed, labels=None):
    """Images ``[n, 1, 8, 8]``: bars on a dark background, wider for higher classes."""
    draw = torch.Generator().manual_seed(seed)
    y = (torch.arange(n) // 6) % 3 if labels is None else labels
    x = -0.8 + 0.05 * torch.randn(n, 1, 8, 8, generator=draw)
    for row, k in enumerate(y.tolist()):
        x[row, :, :, 2 : 3 + k] += 1.4
    return x, y


@dataclass(frozen=True)
class Case:
    """Data of an alignment.

    Attributes:
        make: windows and labels from a number, a seed and optional labels.
        distort: windows that a device with a known error records.
        errors: errors of seen clients.
        strong: a strong error.
        accuracy: largest root mean square difference between realigned and original windows, relative to the spread
            of the windows.
    """

    make: Callable
    distort: Callable
    errors: list
    strong: object
    accuracy: float


VECTORS = torch.randn(6, 3, generator=torch.Generator().manual_seed(5))
CASES = {
    "rotation": Case(
        lambda n, seed, labels=None: data.windows(n, seed, labels=labels),
        lambda x, vector: data.turn(x, so3.from_vector(vector)),
        list(0.1 * VECTORS),
        torch.tensor([0.5, -0.2, 0.3]),
        0.1,
    ),
    "gain": Case(
        lambda n, seed, labels=None: data.windows(n, seed, labels=labels),
        lambda x, v: x * (v[:1].exp() * torch.tensor([1.0, 1.1, 0.9, 1, 1, 1]))[:, None] + 0.1 * v[1],
        list(0.2 * VECTORS),
        torch.tensor([0.5, 0.5, 0.0]),
        0.1,
    ),
    "image": Case(
        images,
        lambda x, v: (1 if v[2] > -0.2 else -1) * (0.5 * v[0]).exp() * x + 0.1 * v[1],
        list(0.2 * VECTORS),
        torch.tensor([-0.4, 0.5, -1.0]),
        0.1,
    ),
}
CLASSES = {"rotation": data.CLASSES, "gain": data.CLASSES, "image": 3}


def users_of(case):
    return [(case.distort(x, error), y) for i, error in enumerate(case.errors) for x, y in [case.make(96, 100 + i)]]


@pytest.fixture(scope="module")
def fitted():
    return {
        name: fit_alignment(name, users_of(case), CLASSES[name], data.TRIPLES if name == "rotation" else ())
        for name, case in CASES.items()
    }


@pytest.fixture(params=sorted(alignments()))
def name(request):
    return request.param


@pytest.fixture
def aligner(name, fitted):
    return fitted[name]


@pytest.fixture
def case(name):
    return CASES[name]


def flat(aligner):
    """Without a preference for small transformations."""
    spread = torch.where(aligner.prior.spread > 0, 1e6, 1.0).double()
    return replace(aligner, prior=replace(aligner.prior, spread=spread))


def value_of(aligner, x):
    return aligner.follow(x, LIKE)["align_value"]


def realigned(aligner, x):
    value = value_of(aligner, x)
    return aligner.alignment.apply(value.expand(len(x), -1), x, aligner.triples)


def distance(a, b):
    return float((a - b).square().mean().sqrt() / b.std())


def test_identity_changes_nothing(aligner, case):
    x, _ = case.make(4, 1)
    value = aligner.identity.expand(4, -1)
    assert torch.equal(aligner.alignment.apply(value, x, aligner.triples), x)
    z = aligner.measure(x)[0]
    assert torch.allclose(aligner.alignment.transform(aligner.identity.to(z), z), z)
    assert not aligner.alignment.coordinates(aligner.identity).any()


def test_summaries_of_transformed_windows_are_transformed_summaries(aligner, case):
    x, _ = case.make(12, 2)
    value = value_of(flat(aligner), case.distort(case.make(WINDOWS, 3)[0], case.strong))
    out = aligner.alignment.apply(value.expand(12, -1), x, aligner.triples)
    z = aligner.alignment.summaries(x, aligner.triples)
    moved = aligner.alignment.transform(value[0].to(z), z)
    assert torch.allclose(aligner.alignment.summaries(out, aligner.triples), moved, atol=2e-3)


def test_known_error_is_undone(aligner, case):
    x, _ = case.make(WINDOWS, 4)
    bad = case.distort(x, case.strong)
    # The common frame of seen clients is known up to their mean error.
    straight = realigned(flat(aligner), x)
    assert distance(bad, x) > 0.3
    assert distance(realigned(flat(aligner), bad), straight) < case.accuracy


def test_error_of_the_stream_does_not_change_the_result(aligner, case):
    # Equivariance: the aligned windows are those of the stream without error.
    x, _ = case.make(WINDOWS, 5)
    search, z = (
        flat(aligner).estimator,
        [aligner.alignment.summaries(w, aligner.triples) for w in (x, case.distort(x, case.strong))],
    )
    n = torch.ones(1, WINDOWS, dtype=torch.float64)
    found = [search((n, part[None]), aligner.identity.double()[None]) for part in z]
    first, second = (aligner.alignment.transform(v[0], part) for v, part in zip(found, z, strict=True))
    assert torch.allclose(first, second, atol=0.05)


def test_search_is_at_least_as_good_as_the_identity(aligner, case):
    for seed, labels in ((6, None), (7, torch.zeros(WINDOWS, dtype=torch.long))):
        z = aligner.measure(case.make(WINDOWS, seed, labels)[0])[0][None]
        n, identity = torch.ones(1, WINDOWS, dtype=torch.float64), aligner.identity.double()[None]
        found = aligner.estimator((n, z), identity)
        both = aligner.estimator.objective(n, z, torch.stack([found, identity], 1))
        assert both[0, 0] >= both[0, 1]


def test_no_objective_is_above_the_bound(aligner, case):
    for bad in (case.make(16, 21)[0], case.distort(case.make(16, 21)[0], case.strong)):
        z, n = aligner.measure(bad)[0][None], torch.ones(1, 16, dtype=torch.float64)
        start = aligner.identity.double()[None]
        found = torch.stack([start, aligner.estimator((n, z), start), value_of(flat(aligner), bad)], 1)
        assert (aligner.estimator.objective(n, z, found) <= aligner.estimator.bound(n, z)).all()


def test_one_class_stays_near_the_identity(aligner, case):
    base = realigned(aligner, case.make(WINDOWS, 8)[0])
    reference = distance(base, case.make(WINDOWS, 8)[0])
    for label in range(2):
        x, _ = case.make(WINDOWS, 9, torch.full((WINDOWS,), label))
        assert distance(realigned(aligner, x), x) < reference + 0.25


def test_without_information_in_the_classes_it_is_the_identity(aligner, case):
    wide = replace(aligner.prior, cov=aligner.prior.cov * 1e6)
    blind = replace(aligner, prior=wide)
    x = case.distort(case.make(WINDOWS, 10)[0], case.strong)
    assert torch.equal(value_of(blind, x)[0], aligner.identity.double())


def test_recorded_stream_gives_the_estimate_of_its_windows_one_by_one(aligner, case):
    x = case.distort(case.make(30, 11)[0], case.strong)
    z, n = aligner.measure(x)[0][None], torch.ones(1, 30, dtype=torch.float64)
    rows, slot = aligner.start(LIKE), torch.zeros(1, dtype=torch.long)
    for t in range(30):
        aligner.learn(rows, slot, z[0, t : t + 1], torch.ones(1, dtype=torch.bool), torch.ones(1).double())
    batch = aligner.estimator((n, z), aligner.identity.double()[None])
    moved = [aligner.alignment.apply(v.expand(30, -1), x, aligner.triples) for v in (rows["align_value"], batch)]
    assert distance(*moved) < 0.02


def test_later_windows_do_not_change_earlier_estimates(aligner, case):
    x = case.distort(case.make(20, 12)[0], case.strong)
    other = torch.cat([x[:15], case.make(20, 13)[0][15:]])
    assert torch.equal(value_of(aligner, x[:15]), value_of(aligner, other[:15]))


def test_state_does_not_grow_with_the_stream(aligner, case):
    sizes = []
    for count in (40, 120):
        rows = aligner.follow(case.make(count, 14)[0], LIKE)
        sizes.append(sum(t.numel() for t in aligner.get(rows, 0).values()))
    assert sizes[0] == sizes[1]


def test_evidence_is_positive_for_an_error_and_small_without(aligner, case):
    x, _ = case.make(WINDOWS, 15)
    slot = torch.zeros(1, dtype=torch.long)
    wrong, right = (
        float(aligner.evidence(aligner.follow(windows, LIKE), slot)) for windows in (case.distort(x, case.strong), x)
    )
    assert wrong > 3
    assert abs(right) < wrong / 2


def test_alignment_is_used_only_with_evidence(aligner, case):
    x, slots = case.distort(case.make(3, 15)[0], case.strong), torch.zeros(3, dtype=torch.long)
    rows = aligner.start(LIKE) | {"align_value": value_of(aligner, x.repeat(20, *[1] * (x.dim() - 1)))}
    rows["align_evidence"][0] = FOR - 0.01
    assert torch.equal(aligner.apply(rows, slots, x), x)
    rows["align_evidence"][0] = FOR
    assert torch.equal(
        aligner.apply(rows, slots, x), aligner.alignment.apply(rows["align_value"][slots], x, aligner.triples)
    )
    assert not torch.allclose(aligner.apply(rows, slots, x), x, atol=1e-3)


def test_states_merge_and_survive_put(aligner, case):
    a, b = (aligner.get(aligner.follow(case.make(n, s)[0], LIKE), 0) for n, s in ((20, 16), (30, 17)))
    merged = merge_states(a, b)
    assert float(merged["n"].sum()) == 50
    rows = aligner.start(LIKE)
    aligner.put(rows, 0, merged)
    assert float(rows["align_n"].sum()) == pytest.approx(50)
    assert aligner.check(aligner.get(rows, 0))


def test_sums_are_additive(name, aligner, case):
    users = [LabeledWindows(x, y, CLASSES[name], aligner.triples) for x, y in users_of(case)]
    total = add_sums([aligner.alignment.client_sums(None, u, {}) for u in users])
    first = aligner.alignment.from_sums(total)
    assert torch.allclose(total["n"].sum(), torch.tensor(96.0 * len(users), dtype=torch.float64))
    assert AlignmentPrior(**first).seen.all()
    again = add_sums([aligner.alignment.client_sums(None, u, {}) for u in reversed(users)])
    assert all(torch.allclose(again[k], v) for k, v in total.items())


def test_noise_on_the_sums_leaves_a_valid_prior(name, aligner, case):
    x, y = users_of(case)[0]
    sums = aligner.alignment.client_sums(None, LabeledWindows(x, y, CLASSES[name], aligner.triples), {})
    draw = torch.Generator().manual_seed(0)
    noised = {k: v / 96 + 0.3 * torch.randn(v.shape, generator=draw) for k, v in sums.items()}
    noised["clients"] = sums["clients"]
    prior = AlignmentPrior(**aligner.alignment.from_sums(noised))
    assert torch.linalg.eigvalsh(prior.cov).min() > 0
    assert (prior.spread > 0).all()


@pytest.mark.slow
def test_two_thousand_users_are_aligned_like_one(aligner, case):
    users = 2000
    x = case.distort(case.make(6, 18)[0], case.strong)
    z, usable = aligner.measure(x)
    tables = []
    for count in (1, users):
        rows = {k: v.repeat(count, *[1] * (v.dim() - 1)) for k, v in aligner.start(LIKE).items()}
        for t in range(6):
            every = torch.arange(count)
            aligner.learn(
                rows, every, z[t].expand(count, -1), usable[t].expand(count), torch.ones(count, dtype=torch.float64)
            )
        tables.append(rows)
    for name, value in tables[0].items():
        assert torch.allclose(tables[1][name], value.expand_as(tables[1][name]), atol=1e-6)
    assert sum(v.numel() for v in tables[1].values()) == users * aligner.values_per_user
    assert aligner.values_per_user < 640  # 100,000 users need at most 256 MB in float32


@pytest.mark.parametrize("kind", ["gain", "rotation"])
def test_windows_of_another_unit_are_refused(kind, fitted):
    with pytest.raises(UserError, match="use one unit"):
        fitted[kind].measure(9.81 * CASES[kind].make(4, 19)[0])


@pytest.mark.parametrize("kind", ["gain", "image"])
def test_windows_of_another_shape_are_refused(kind, fitted):
    with pytest.raises(UserError, match=f"alignment '{kind}' works on"):
        fitted[kind].measure(torch.zeros(2, 5))


def test_saturated_and_dead_channels_are_not_used(fitted):
    x, _ = CASES["gain"].make(4, 20)
    x[1, 0] = torch.linspace(-20, 20, 24).clamp(-5.0, 5.0)
    x[2, 4] = 0.0
    assert fitted["gain"].measure(x)[1].tolist() == [True, False, False, True]

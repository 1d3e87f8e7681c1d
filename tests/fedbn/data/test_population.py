"""Populations from arrays, Datasets and data sets equal those of files with the same content."""

from __future__ import annotations

from dataclasses import replace

import datasets
import numpy as np
import pytest
import torch
from torch.utils.data import Dataset, TensorDataset

import fedbn
from fedbn.data.lazy import LazyRows
from fedbn.data.population import Population
from fedbn.data.skew import measure
from fedbn.data.splits import carve_validation
from fedbn.errors import UserError
from fedbn.scenarios.base import scenario, scenario_text
from fedbn.tasks import MultiLabel, Regression, Segmentation, SequenceLabels
from fedbn_simulations.engines.deployment import differences

ROWS = 72
RNG = np.random.default_rng(0)
X = RNG.normal(size=(ROWS, 2, 5)).astype(np.float32)
Y = np.arange(ROWS) % 3
USER = np.repeat(["ana", "bob", "cem"], ROWS // 3)


def same_data(a, b):
    """Whether two populations have the same users, data and unseen users; the domain is the name of the data."""
    first, second = (replace(p, users=tuple(replace(u, domain="") for u in p.users)) for p in (a, b))
    return first.digest == second.digest


@pytest.mark.parametrize(
    "columns", [{}, {"recording": np.arange(ROWS) // 6}, {"split": np.where(Y == 2, "test", "train")}]
)
@pytest.mark.parametrize("seed", [0, 1])
def test_from_arrays_equals_files(tmp_path, columns, seed):
    np.savez(tmp_path / "mine.npz", x=X, y=Y, user=USER, **columns)
    population = Population.from_arrays(X, Y, user=USER, **columns)
    expected = scenario(f"files:path={tmp_path / 'mine.npz'}").load(seed)
    assert same_data(scenario(scenario_text(population)).load(seed), expected)
    assert [u.name for u in population.users] == ["ana", "bob", "cem"]


def test_from_arrays_reads_images_as_files_do(tmp_path):
    images = RNG.integers(0, 256, (ROWS, 8, 9, 3), dtype=np.uint8)
    np.savez(tmp_path / "mine.npz", x=images, y=Y, user=USER)
    population = Population.from_arrays(torch.from_numpy(images), torch.from_numpy(Y), user=list(USER))
    assert population.shape == (3, 8, 9)
    assert same_data(population, scenario(f"files:path={tmp_path / 'mine.npz'}").load(0))


def test_from_arrays_holds_out_named_or_drawn_users():
    named = Population.from_arrays(X, Y, user=USER, unseen=["cem", "ana"])
    assert named.unseen == named.for_seed(3).unseen == (0, 2)
    assert Population.from_arrays(X, Y, user=USER, unseen="bob").unseen == (1,)
    assert Population.from_arrays(X, Y, user=np.repeat([7, 8, 9], 24), unseen=[8]).unseen == (1,)
    drawn = Population.from_arrays(X, Y, user=USER, unseen=1)
    assert {drawn.for_seed(seed).unseen for seed in range(3)} == {(0,), (1,), (2,)}
    split = np.where(USER == "bob", "test", np.where(Y == 0, "test", "train"))
    assert Population.from_arrays(X, Y, user=USER, split=split).for_seed(2).unseen == (1,)


def test_from_arrays_without_users_is_pooled():
    population = Population.from_arrays(X, Y)
    assert population.pooled
    assert population.for_seed(1).unseen == ()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"y": Y[:-1]}, "arrays: x has 72 rows, y has 71 rows, user has 72 rows; they need the same number"),
        (
            {"x": [[1.0]] + [[2.0, 3.0]] * (ROWS - 1)},
            "rows of 'x' differ in shape (row 0 has [1], row 1 has [2]); bring",
        ),
        ({"y": [[1.0], [2.0, 3.0]]}, "arrays: y has rows of different shapes; bring them to one shape"),
        ({"x": np.where(X > 2, np.nan, X)}, "NaN or infinite values"),
        ({"x": "walks.csv"}, "x"),
        ({"y": 3}, "'y' is a single value, but y needs one value per row"),
        ({"split": np.repeat("training set", ROWS)}, "column 'split' holds 'training set', which is not train"),
        ({"unseen": ["dan"]}, "unknown user in unseen= of arrays 'dan'. Did you mean 'ana'. Known: ana, bob, cem"),
        ({"unseen": ["ana", "bob", "cem"]}, "all 3 users are unseen, so nobody trains"),
        ({"unseen": 3}, "3 unseen of 3 users leaves no user for training"),
        ({"y": np.linspace(0, 1, ROWS)}, "as for regression"),
    ],
)
def test_from_arrays_rejects_bad_input(change, message):
    values = {"x": X, "y": Y, "user": USER} | change
    with pytest.raises(UserError) as caught:
        Population.from_arrays(**values)
    assert message.replace("'ana'. Known", "'ana'? Known") in str(caught.value)


class Items(Dataset):
    """A Dataset of pairs."""

    def __init__(self, items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return self.items[index]


class Noisy(Items):
    def __getitem__(self, index):
        x, y = self.items[index]
        return x + torch.rand(()), y


def by_user(make=TensorDataset):
    """Training and test Dataset of each user, and the same rows as arrays."""
    x, y, split = torch.from_numpy(X), torch.from_numpy(Y), np.arange(ROWS) % 24 < 16
    rows = {user: user == USER for user in ("ana", "bob", "cem")}
    pairs = {u: tuple(make(x[r & part], y[r & part]) for part in (split, ~split)) for u, r in rows.items()}
    return pairs, Population.from_arrays(X, Y, user=USER, split=np.where(split, "train", "test"))


def test_from_datasets_equals_arrays(tmp_path):
    pairs, expected = by_user()
    assert same_data(Population.from_datasets(pairs), expected)
    items = {u: tuple(Items([(x.numpy(), int(y)) for x, y in data]) for data in pair) for u, pair in pairs.items()}
    assert same_data(Population.from_datasets(items), expected)


def test_from_datasets_keeps_values_on_disk(tmp_path):
    pairs, expected = by_user()
    population = Population.from_datasets(pairs, cache=tmp_path / "values.npy")
    assert same_data(population, expected)
    stored = np.load(tmp_path / "values.npy", mmap_mode="r+")
    stored[0] = 7
    stored.flush()
    assert (population.users[0].train.x[0] == 7).all()  # a view of the file, no copy


def test_from_arrays_keeps_read_only_files_on_disk(tmp_path, recwarn):
    np.save(tmp_path / "x.npy", X)
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    population = Population.from_arrays(mapped, Y, user=USER)
    from_memory = Population.from_arrays(X, Y, user=USER)
    assert same_data(population, from_memory)
    assert {type(u.train.x) for u in population.users} == {LazyRows}
    user = carve_validation(population.users[0])
    assert {type(user.train.x), type(user.test.x)} == {LazyRows}
    assert torch.equal(user.test.x[:], carve_validation(from_memory.users[0]).test.x)
    assert not recwarn


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.float16, np.float64])
def test_from_arrays_reads_mapped_rows_one_by_one(tmp_path, dtype, monkeypatch):
    images = RNG.integers(0, 256, (ROWS + 1, 8, 9, 3)).astype(dtype)
    user = np.append(np.tile(["ana", "bob", "cem"], ROWS // 3), "dan")  # rows are not successive; dan has too few
    labels = np.arange(ROWS + 1) // 3 % 3
    np.save(tmp_path / "x.npy", images)
    reads = []
    read = LazyRows._read
    monkeypatch.setattr(LazyRows, "_read", lambda self, rows: reads.append(rows.numel()) or read(self, rows))
    mapped = Population.from_arrays(np.load(tmp_path / "x.npy", mmap_mode="r"), labels, user=user)
    expected = Population.from_arrays(images, labels, user=user)
    assert not reads
    assert mapped.notices == expected.notices
    assert same_data(mapped, expected)
    assert max(reads) <= len(mapped.users[0].train)
    torch.save(mapped.users[0].train, tmp_path / "train.pt")  # for worker processes
    copied = torch.load(tmp_path / "train.pt", mmap=True, weights_only=False)
    assert torch.equal(copied.x[torch.tensor([3, 1])], expected.users[0].train.x[[3, 1]])
    del reads[:]
    results = [
        fedbn.federate(p, model="small-cnn", engine="reference", rounds=2, batch_size=8) for p in (mapped, expected)
    ]
    assert differences(*(result.outcome for result in results)) == ()
    assert max(reads) <= len(mapped.users[0].train)
    assert measure(mapped) == measure(expected)


def test_from_arrays_pads_series_to_a_length():
    series = [x[:, : 3 + i % 3] for i, x in enumerate(X)]
    padded = np.where(np.arange(5) < 3 + np.arange(ROWS)[:, None, None] % 3, X, 0)
    assert same_data(
        Population.from_arrays(series, Y, user=USER, length=5), Population.from_arrays(padded, Y, user=USER)
    )
    cut = Population.from_arrays(X, Y, user=USER, length=3)
    assert same_data(cut, Population.from_arrays(X[..., :3].copy(), Y, user=USER))


@pytest.mark.slow
def test_from_datasets_with_workers_equals_arrays():
    pairs, expected = by_user()
    state = torch.get_rng_state()
    assert same_data(Population.from_datasets(pairs, workers=2), expected)
    assert torch.equal(torch.get_rng_state(), state)


def test_from_datasets_without_training_data_is_unseen():
    pairs, _ = by_user()
    population = Population.from_datasets(pairs | {"bob": (None, pairs["bob"][1])})
    assert population.for_seed(2).unseen == (1,)


PAIR = (torch.zeros(3), 0)


@pytest.mark.parametrize(
    ("users", "message"),
    [
        ({}, "datasets: give a dictionary with a pair of Datasets (train, test) for each user"),
        ([Items([PAIR])], "give a dictionary with a pair of Datasets"),
        ({"ana": Items([PAIR])}, "user 'ana' needs a pair of Datasets (train, test), not Items"),
        ({"ana": (iter([PAIR]), Items([PAIR]))}, "the train data of user 'ana' are a list_iterator, not a map-style"),
        ({"ana": (Items([PAIR]), None)}, "the test data of user 'ana' are a NoneType, not a map-style Dataset"),
        (
            {"ana": (Items([PAIR, (torch.zeros(4), 1)]), Items([PAIR]))},
            "user 'ana', train item 1 is float32 of shape [4], but the first item of the data is float32 of shape [3]",
        ),
        ({"ana": (Items([PAIR, (torch.zeros(3).int(), 1)]), Items([PAIR]))}, "train item 1 is int32 of shape [3]"),
        ({"ana": (Items([PAIR]), Items([torch.zeros(3)]))}, "test item 0 is a Tensor, but a pair (x, y) is needed"),
        ({"ana": (Items([("text", 0)]), Items([PAIR]))}, "train item 0 has values of type <U4, but numbers are needed"),
        ({"ana": (Noisy([PAIR]), Items([PAIR]))}, "train item 0 has other values when it is read again"),
        ({"ana": (Items([]), Items([]))}, "the Datasets have no items"),
    ],
)
def test_from_datasets_rejects_bad_input(users, message):
    with pytest.raises(UserError) as caught:
        Population.from_datasets(users)
    assert message in str(caught.value)


def table(**columns):
    features = {"label": datasets.ClassLabel(names=["sit", "walk", "run"])}
    data = datasets.Dataset.from_dict({"values": X.reshape(ROWS, -1).tolist(), "label": Y, "who": USER} | columns)
    return data.cast(datasets.Features(dict(data.features) | features))


def test_from_huggingface_equals_arrays():
    population = Population.from_huggingface(table(), x="values", y="label", user="who")
    assert population.classes == ("sit", "walk", "run")
    expected = Population.from_arrays(X.reshape(ROWS, -1), Y, user=USER, classes=population.classes)
    assert same_data(population, expected)


@pytest.mark.parametrize(
    ("task", "targets"),
    [
        (Regression(), np.linspace(0, 1, ROWS)),
        (Regression(), np.stack([np.linspace(0, 1, ROWS), np.ones(ROWS)], 1)),
        (MultiLabel(), np.stack([Y == 0, Y > 0], 1).astype(int)),
        (SequenceLabels(), np.stack([Y, np.full(ROWS, -100)], 1)),
    ],
)
def test_from_huggingface_reads_targets_of_a_task(task, targets):
    rows = table(target=targets.tolist())
    expected = Population.from_arrays(X.reshape(ROWS, -1), targets, user=USER, task=task)
    assert same_data(Population.from_huggingface(rows, x="values", y="target", user="who", task=task), expected)
    federated = Population.from_federated(Federated(rows), x="values", y="target", gap=1, task=task)
    assert same_data(federated, expected)


def test_from_huggingface_reads_masks():
    images, masks = RNG.normal(size=(ROWS, 1, 8, 8)).astype(np.float32), RNG.integers(0, 2, (ROWS, 8, 8))
    rows = datasets.Dataset.from_dict({"image": images, "mask": masks, "who": USER})
    found = Population.from_huggingface(rows, x="image", y="mask", user="who", task=Segmentation())
    assert same_data(found, Population.from_arrays(images, masks, user=USER, task=Segmentation()))


def test_from_huggingface_uses_the_splits():
    whole = table()
    parts = datasets.DatasetDict({"train": whole.select(range(0, ROWS, 2)), "test": whole.select(range(1, ROWS, 2))})
    population = Population.from_huggingface(parts, x="values", y="label", user="who")
    assert [len(u.test) for u in population.users] == [12, 12, 12]
    with pytest.raises(UserError, match="which are not train, validation and test; pass one of them"):
        Population.from_huggingface(
            datasets.DatasetDict({"north": whole, "south": whole}), x="values", y="label", user="who"
        )
    with pytest.raises(UserError, match="Did you mean 'label'"):
        Population.from_huggingface(whole, x="values", y="lable")


class Federated:
    """What is used of `flwr_datasets.FederatedDataset`, which can only load data sets of the hub."""

    def __init__(self, whole):
        from flwr_datasets.partitioner import NaturalIdPartitioner

        partitioner = NaturalIdPartitioner(partition_by="who")
        partitioner.dataset = whole
        self.partitioners = {"train": partitioner}

    def load_partition(self, partition_id, split):
        return self.partitioners[split].load_partition(partition_id)


@pytest.mark.slow
def test_from_federated_has_a_user_per_partition():
    population = Population.from_federated(Federated(table()), x="values", y="label", gap=1)
    expected = Population.from_huggingface(table(), x="values", y="label", user="who")
    assert same_data(population, expected)
    with pytest.raises(UserError, match="split 'test' has no partitioner \\(splits with one: train\\)"):
        Population.from_federated(Federated(table()), x="values", y="label", split="test")

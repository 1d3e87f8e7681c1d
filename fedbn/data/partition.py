"""Partition the pooled data of the seen users into new clients: IID, label skew, quantity skew.

Training and test rows are partitioned separately, so test rows never become training rows. The test rows of each client
follow the label distribution of its training rows. Unseen users do not change.

The schemes use the partitioners of flwr-datasets on row indices, so no data are copied. These partitioners hand out
rows in stored order, where neighbors often have the same user, so rows are shuffled first. Two schemes have an
implementation of their own: IID, and Dirichlet where the one of flwr-datasets fails (hundreds of clients, or a small
alpha).
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import warnings
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch

from fedbn.data.population import Examples, Population, User
from fedbn.errors import UserError
from fedbn.plugins import parse, render
from fedbn.seeds import key, numpy_generator

Indices = list[np.ndarray]


@dataclass(frozen=True)
class Rows:
    """Label and source user of every pooled training row, the input of a partition scheme."""

    label: np.ndarray
    user: np.ndarray


class Partition(ABC):
    """A partition scheme; its fields are its options.

    Attributes:
        name: name on the command line.
        about: one-line description.
        by_class: whether rows are dealt by their class.
    """

    name: ClassVar[str]
    about: ClassVar[str]
    by_class: ClassVar[bool] = False

    @abstractmethod
    def split(self, rows: Rows, seed: int) -> Indices | None:
        """Row indices of each client; None leaves the users unchanged."""

    def _assign(self, partitioner: Any, rows: Rows, seed: int) -> Indices:
        """Row indices of each client by a partitioner of flwr-datasets, which gets the rows in random order."""
        order = numpy_generator(seed, "partition", self.name).permutation(len(rows.label))
        return [order[i] for i in _load_indices(partitioner, rows.label[order])]


@dataclass(frozen=True)
class Natural(Partition):
    """Users as loaded."""

    name = "natural"
    about = "users as they are: the real skew"

    def split(self, rows: Rows, seed: int) -> None:
        return None


@dataclass(frozen=True)
class Grouped(Partition):
    """Several real users merged into one client (mixed domains)."""

    name = "grouped"
    about = "several real users behind one client (size users each)"
    size: int = 2

    def split(self, rows: Rows, seed: int) -> Indices:
        users = np.unique(rows.user)
        if not 1 <= self.size <= len(users):
            raise UserError(f"grouped: size={self.size} users per client is impossible; choose 1 to {len(users)}")
        users = numpy_generator(seed, "partition", "grouped").permutation(users)
        groups = np.array_split(users, -(-len(users) // self.size))
        return [np.flatnonzero(np.isin(rows.user, g)) for g in groups]


@dataclass(frozen=True)
class Iid(Partition):
    """Rows assigned at random, equally many to each client."""

    name = "iid"
    about = "rows dealt at random: no skew"
    clients: int = 20

    def split(self, rows: Rows, seed: int) -> Indices:
        order = numpy_generator(seed, "partition", "iid").permutation(len(rows.label))
        return list(np.array_split(order, self.clients))


@dataclass(frozen=True)
class Dirichlet(Partition):
    """Class proportions drawn from Dirichlet(alpha); a small alpha gives a strong label skew.

    Hsu, Qi, Brown, 2019, https://arxiv.org/abs/1909.06335

    Attributes:
        alpha: concentration.
        clients: number of clients.
        least: minimum number of rows per client.
    """

    name = "dirichlet"
    about = "label skew: class proportions drawn from Dirichlet(alpha)"
    by_class = True
    alpha: float = 0.5
    clients: int = 20
    least: int = 10

    def split(self, rows: Rows, seed: int) -> Indices:
        if not self.alpha > 0:
            raise UserError(f"dirichlet: alpha must be positive, not {self.alpha}")
        if self.least * self.clients > len(rows.label):
            raise UserError(
                f"dirichlet: {self.clients} clients with at least {self.least} rows need {self.least * self.clients}, "
                f"but there are {len(rows.label)}: use fewer clients or a smaller least"
            )
        if self.clients <= 100:
            options = {"min_partition_size": self.least, "self_balancing": False}
            partitioner = _seeded("Dirichlet", seed, self.clients, "label", self.alpha, **options)
            with contextlib.suppress(ValueError):  # raised after ten attempts to reach `least`
                return self._assign(partitioner, rows, seed)
        return self._split_all(rows, seed)

    def _split_all(self, rows: Rows, seed: int) -> Indices:
        """Assign every row, for any number of clients; move rows to clients that have fewer than ``least``."""
        rng = numpy_generator(seed, "partition", "dirichlet")
        indices: list[list[int]] = [[] for _ in range(self.clients)]
        for label in np.unique(rows.label):
            members = rng.permutation(np.flatnonzero(rows.label == label))
            counts = shares(rng.dirichlet(np.full(self.clients, self.alpha)), len(members))
            for client, part in zip(indices, np.split(members, np.cumsum(counts)[:-1]), strict=True):
                client.extend(part.tolist())
        for client in indices:
            while len(client) < self.least:
                client.append(max(indices, key=len).pop())
        return [np.array(i, dtype=np.int64) for i in indices]


@dataclass(frozen=True)
class Pathological(Partition):
    """A fixed number of classes per client."""

    name = "pathological"
    about = "label skew: each client holds only a few classes"
    by_class = True
    classes: int = 2
    clients: int = 20

    def split(self, rows: Rows, seed: int) -> Indices:
        present = len(np.unique(rows.label))
        if not 1 <= self.classes <= present:
            raise UserError(f"pathological: classes={self.classes} per client is impossible; choose 1 to {present}")
        if self.classes * self.clients < present:
            raise UserError(
                f"pathological: {self.clients} clients with {self.classes} classes each cannot cover all {present} "
                "classes: use more clients or classes"
            )
        mode = "first-deterministic"
        partitioner = _seeded("Pathological", seed, self.clients, "label", self.classes, class_assignment_mode=mode)
        return self._assign(partitioner, rows, seed)


@dataclass(frozen=True)
class Shard(Partition):
    """Rows sorted by label and split into shards; each client gets some shards.

    McMahan et al., 2017, https://arxiv.org/abs/1602.05629
    """

    name = "shard"
    about = "label skew: label-sorted shards, some to each client"
    by_class = True
    shards: int = 2
    clients: int = 20

    def split(self, rows: Rows, seed: int) -> Indices:
        if not 1 <= self.shards * self.clients <= len(rows.label):
            raise UserError(
                f"shard: {self.shards * self.clients} shards of {len(rows.label)} rows are impossible; use fewer"
            )
        partitioner = _seeded("Shard", seed, self.clients, "label", num_shards_per_partition=self.shards)
        return self._assign(partitioner, rows, seed)


class _Sized(Partition):
    """Base class of schemes with quantity skew only: random rows, different numbers of rows per client."""

    clients: int

    def split(self, rows: Rows, seed: int) -> Indices:
        partitioner = _partitioner(self.name.capitalize(), getattr(self, "sizes", self.clients))
        return self._assign(partitioner, rows, seed)


@dataclass(frozen=True)
class Linear(_Sized):
    """Number of rows of client i proportional to i."""

    name = "linear"
    about = "quantity skew: sizes grow linearly"
    clients: int = 20


@dataclass(frozen=True)
class Square(_Sized):
    """Number of rows of client i proportional to the square of i."""

    name = "square"
    about = "quantity skew: sizes grow quadratically"
    clients: int = 20


@dataclass(frozen=True)
class Exponential(_Sized):
    """Number of rows of client i proportional to exp(i)."""

    name = "exponential"
    about = "quantity skew: sizes grow exponentially"
    clients: int = 6


@dataclass(frozen=True)
class Size(_Sized):
    """Given numbers of rows."""

    name = "size"
    about = "quantity skew: sizes as given, e.g. size:sizes=100+200+400"
    sizes: tuple[int, ...] = ()

    @property
    def clients(self) -> int:  # type: ignore[override]
        """Number of sizes."""
        return len(self.sizes)

    def split(self, rows: Rows, seed: int) -> Indices:
        if not self.sizes or min(self.sizes) < 1 or sum(self.sizes) > len(rows.label):
            raise UserError(
                f"size: sizes={'+'.join(map(str, self.sizes)) or '(none)'} must be positive and sum to at most "
                f"{len(rows.label)}"
            )
        return super().split(rows, seed)


def partitions() -> dict[str, type[Partition]]:
    """All partition schemes, by name."""
    schemes: list[Any] = [Natural, Grouped, Iid, Dirichlet, Pathological, Shard, Linear, Square, Exponential, Size]
    return {s.name: s for s in schemes}


def parse_partition(text: str) -> str:
    """Canonical (shortest) form of the partition ``text``.

    >>> parse_partition("dirichlet:alpha=0.1:clients=20")
    'dirichlet:alpha=0.1'

    Raises:
        UserError: if the scheme or an option is unknown.
    """
    return render(parse(text, "partition", partitions()))


def shares(proportions: np.ndarray, total: int) -> np.ndarray:
    """Split ``total`` into integer counts with the given proportions (largest remainder method).

    >>> shares(np.array([1.0, 1.0, 2.0]), 5).tolist()
    [1, 1, 3]
    """
    exact = proportions / proportions.sum() * total
    counts = np.floor(exact).astype(np.int64)
    for i in np.argsort(counts - exact, kind="stable")[: total - counts.sum()]:
        counts[i] += 1
    return counts


def digest(indices: Indices) -> str:
    """SHA-256 of the row indices of all clients."""
    text = ";".join(",".join(map(str, i.tolist())) for i in indices)
    return hashlib.sha256(text.encode()).hexdigest()


def _partitioner(kind: str, *args: Any, **options: Any) -> Any:
    """A partitioner of flwr-datasets; its import is slow."""
    from flwr_datasets import partitioner

    return getattr(partitioner, f"{kind}Partitioner")(*args, **options)


def _seeded(kind: str, seed: int, *args: Any, **options: Any) -> Any:
    """A partitioner with a seed for this purpose."""
    return _partitioner(kind, *args, **options, seed=key(seed, "partition") % 2**32)


def _load_indices(partitioner: Any, labels: np.ndarray) -> Indices:
    """Row indices of each client according to a partitioner of flwr-datasets."""
    import datasets

    disabled = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        with (
            contextlib.redirect_stderr(io.StringIO()),
            contextlib.redirect_stdout(io.StringIO()),
            warnings.catch_warnings(action="ignore"),
        ):
            partitioner.dataset = datasets.Dataset.from_dict(
                {"index": np.arange(len(labels)), "label": labels.astype(np.int64)}
            )
            parts = (partitioner.load_partition(i).with_format("numpy") for i in range(partitioner.num_partitions))
            return [np.asarray(part["index"][:], dtype=np.int64) for part in parts]
    finally:
        if not disabled:
            datasets.enable_progress_bars()


def repartition(population: Population, text: str, seed: int) -> Population:
    """Partition the rows of the seen users into new clients.

    Args:
        population: users as loaded.
        text: a partition, e.g. ``dirichlet:alpha=0.1:clients=20``.
        seed: seed of the run.

    Raises:
        UserError: if the scheme is unknown, its options are impossible for the data, or a client gets too few rows.
    """
    scheme = parse(text or "natural", "partition", partitions())
    if isinstance(scheme, Natural):
        if population.pooled:
            raise UserError(
                f"{', '.join(population.sources)}: there is no column of users; name it with user=NAME, or make "
                "clients of the rows with --partition, for instance iid:clients=10 or dirichlet:alpha=0.5:clients=10"
            )
        return population
    seen = [population.users[i] for i in population.seen]
    recordings = 1 + max((int(p.recording.max()) for u in seen for p in (u.train, u.test) if len(p)), default=0)
    train, source = _pool([u.train for u in seen], recordings)
    test, _ = _pool([u.test for u in seen], recordings)
    if scheme.by_class and not train.has_classes:
        raise UserError(f"{render(scheme)} deals rows by class, but these rows have none: use iid, size or grouped")
    clients = getattr(scheme, "clients", 1)
    if not isinstance(scheme, Size) and not 1 <= clients <= len(train):
        raise UserError(f"{scheme.name}: {clients} clients of {len(train)} training rows; choose 1 to {len(train)}")
    try:
        indices = [np.sort(i) for i in scheme.split(Rows(train.groups.numpy(), source), seed) or ()]
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{render(scheme)} is impossible for {len(train)} training rows: {error}") from None
    for i, rows in enumerate(indices):
        if len(rows) < 2:
            raise UserError(
                f"{render(scheme)} leaves client {i} with {len(rows)} training rows of {len(train)}: use fewer "
                "clients, or a milder skew"
            )
    test_indices = matching_test_rows(
        train.groups.numpy(), indices, test.groups.numpy(), max(1, len(population.classes)), seed
    )
    domains = sorted({u.domain for u in seen})
    domain = domains[0] if len(domains) == 1 else "mixed"
    users = [
        User(f"client{i:04d}", domain, train.take(torch.from_numpy(a)), test.take(torch.from_numpy(b)))
        for i, (a, b) in enumerate(zip(indices, test_indices, strict=True))
    ]
    unseen = [population.users[i] for i in population.unseen]
    origin = f"{len(seen)} users ({population.skew})" if not population.pooled else "a file without users"
    return Population(
        (*users, *unseen),
        tuple(range(len(users), len(users) + len(unseen))),
        population.classes,
        f"{scheme.about}; created by {render(scheme)} from the pooled data of {origin}",
        population.sources | {"partition": digest(indices)},
        notices=population.notices,
        triples=population.triples,
    )


def _pool(parts: list[Examples], recordings: int) -> tuple[Examples, np.ndarray]:
    """All rows, with recording numbers that no two users share (each has at most ``recordings``), and their users."""
    numbered = [Examples(p.x, p.y, p.recording + recordings * i) for i, p in enumerate(parts)]
    return Examples.concat(numbered), np.concatenate([np.full(len(p), i) for i, p in enumerate(parts)])


def matching_test_rows(train: np.ndarray, indices: Indices, test: np.ndarray, classes: int, seed: int) -> Indices:
    """Test rows of each client, for each class in proportion to the client's share of the training rows.

    A client that is too small for any test row gets one of its most frequent class, which another client may have too.
    """
    counts = np.stack([np.bincount(train[i], minlength=classes) for i in indices])
    rng = numpy_generator(seed, "partition", "test")
    assigned: list[list[int]] = [[] for _ in indices]
    for label in range(classes):
        members = rng.permutation(np.flatnonzero(test == label))
        if counts[:, label].sum() == 0:
            continue
        cuts = np.cumsum(shares(counts[:, label].astype(float), len(members)))[:-1]
        for rows, part in zip(assigned, np.split(members, cuts), strict=True):
            rows.extend(part.tolist())
    for rows, count in zip(assigned, counts, strict=True):
        if not rows:
            candidates = np.flatnonzero(np.isin(test, np.argmax(count)))
            rows.append(int(rng.choice(candidates if len(candidates) else len(test))))
    return [np.sort(np.array(r, dtype=np.int64)) for r in assigned]

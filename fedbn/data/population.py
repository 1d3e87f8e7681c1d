"""Populations of users, also from objects: arrays, Datasets, data sets of Hugging Face and Flower."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from fedbn.data.columns import Rows
from fedbn.data.examples import Examples, User
from fedbn.data.labels import Encode, encode_labels
from fedbn.data.readers import dataset_columns
from fedbn.data.sources import array_columns, dataset_rows, federated_columns, make_rows
from fedbn.data.users import build_users, list_names
from fedbn.data.values import Layout
from fedbn.digests import digest
from fedbn.errors import UserError, unknown
from fedbn.seeds import numpy_generator

__all__ = ["Examples", "Population", "User", "build_population", "hold_out", "hold_out_order"]

Unseen = int | Sequence[Any]
"""Number of users that never train, other ones for each seed, or their names."""


class Encoder(Protocol):
    """A task, which converts a column of targets."""

    def encode(self, values: np.ndarray, name: str, classes: tuple[str, ...]) -> tuple[np.ndarray, tuple[str, ...]]: ...


@dataclass(frozen=True)
class Population:
    """All users of a run.

    Attributes:
        users: seen and unseen users, in an order that does not depend on the seed.
        unseen: indices of the users that never train. They only evaluate the final model.
        classes: class names, by index; empty if the task has none.
        skew: one sentence that describes the skew between users (label, feature, quantity; natural or synthetic).
        sources: file or package name -> SHA-256 of the data; part of a run's identity.
        remote: whether the data are stored on the nodes only, and these examples are placeholders of the same shape.
        pooled: whether the data have no users, so that a partition has to make them from the rows of the only user.
        notices: what had to be decided when the data were read.
        held_out: number of unseen users that each seed draws anew; None if ``unseen`` holds for all seeds.
        triples: channels of the axes x, y, z of each sensor of a worn device; the first measures acceleration with
            gravity. Empty: none, or not known.
    """

    users: tuple[User, ...]
    unseen: tuple[int, ...]
    classes: tuple[str, ...]
    skew: str
    sources: dict[str, str] = field(default_factory=dict)
    remote: bool = False
    pooled: bool = False
    notices: tuple[str, ...] = ()
    held_out: int | None = None
    triples: tuple[tuple[int, int, int], ...] = ()

    @cached_property
    def seen(self) -> tuple[int, ...]:
        """Indices of the users that train."""
        unseen = set(self.unseen)
        return tuple(i for i in range(len(self.users)) if i not in unseen)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one example."""
        return tuple(self.users[0].train.x.shape[1:])

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the data, their users, classes and sensors."""
        sensors = (self.triples,) if self.triples else ()
        return digest((self.users, self.unseen, self.held_out, self.classes, self.remote, self.pooled, *sensors))

    def for_seed(self, seed: int) -> Population:
        """The population with the unseen users of a seed."""
        if self.held_out is None:
            return self
        return replace(self, unseen=hold_out(len(self.users), self.held_out, seed))

    @staticmethod
    def from_arrays(
        x: Any,
        y: Any,
        *,
        user: Any = None,
        recording: Any = None,
        split: Any = None,
        unseen: Unseen = 1,
        test: float = 0.25,
        gap: int = 1,
        classes: Sequence[str] = (),
        layout: Layout = "auto",
        scale: float = 0.0,
        length: int = 0,
        task: Encoder | None = None,
        name: str = "arrays",
    ) -> Population:
        """A population of arrays, read as scenario ``files`` reads the columns of a file.

        Test data are the part ``test`` of ``split``, later recordings, or the last rows of each user. A memory-mapped
        array (``numpy.load(path, mmap_mode="r")``) of any numeric type stays on disk; the rows of a batch are read and
        converted to float32 when they are needed.

        Args:
            x: values ``[n, *shape]``, in the order of recording; or n series of different lengths, with ``length``.
            y: classes ``[n]`` (numbers or names), one-hot ``[n, classes]``, or the targets of ``task`` ``[n, ...]``.
            user: user of each row ``[n]``; None if a partition makes the users.
            recording: recording of each row ``[n]``; None if unknown.
            split: train, validation or test, for each row ``[n]``; None to split each user's rows.
            unseen: number of users that never train, others for each seed; or their names.
            test: fraction of a user's recordings (or rows) for testing, in (0, 1).
            gap: number of rows dropped before the test rows if recordings are unknown.
            classes: names of the classes if ``y`` holds their indices.
            layout: whether channels are the first or last axis of an example.
            scale: number by which values are divided; 0 for the largest value of 8-bit arrays and 16-bit images.
            length: number of steps to which series are cut or padded with zeros at the end; 0 for series of one length.
            task: the task whose targets ``y`` are, such as ``fedbn.tasks.Regression()``; None for classes.
            name: name of the data, for messages.

        Raises:
            UserError: data that cannot be used, such as arrays of different lengths or NaN, or an unknown user.

        >>> import numpy as np
        >>> x, y, user = np.random.rand(40, 3), np.arange(40) % 2, np.repeat(["ana", "bob"], 20)
        >>> population = Population.from_arrays(x, y, user=user, unseen=["bob"])
        >>> [(u.name, len(u.train), len(u.test)) for u in population.users], population.unseen
        ([('ana', 14, 5), ('bob', 14, 5)], (1,))
        """
        given = {"user": user, "recording": recording, "split": split}
        columns = array_columns(name, x=x, y=y, **given)
        named = {key: key for key, value in given.items() if value is not None}
        rows, notices = make_rows(columns, name, classes=classes, layout=layout, scale=scale, length=length, **named)
        return _population(rows, name, unseen, notices, task, test, gap)

    @staticmethod
    def from_datasets(
        users: Mapping[str, tuple[Any, Any]],
        *,
        unseen: Unseen = 1,
        classes: Sequence[str] = (),
        workers: int = 0,
        cache: str | Path | None = None,
        layout: Layout = "auto",
        scale: float = 0.0,
        task: Encoder | None = None,
        name: str = "datasets",
    ) -> Population:
        """A population of map-style Datasets of PyTorch, whose items are pairs ``(x, y)``; each item is read once.

        Args:
            users: training and test Dataset of each user. The training Dataset of a user that never trains may be
                None; then part of the test data serves for adaptation.
            unseen: as in `from_arrays`.
            classes: names of the classes if ``y`` holds their indices.
            workers: processes that load items; 0 to load them in this process.
            cache: file ``.npy`` for the values, which are memory-mapped, for data that do not fit in memory; None to
                keep them in memory.
            layout: whether channels are the first or last axis of an example.
            scale: number by which values are divided; 0 for the largest value of 8-bit arrays and 16-bit images.
            task: the task whose targets ``y`` are, such as ``fedbn.tasks.Regression()``; None for classes.
            name: name of the data, for messages.

        Raises:
            UserError: data that cannot be used, such as items of different shapes, or random transforms.

        >>> import torch
        >>> from torch.utils.data import TensorDataset
        >>> data = TensorDataset(torch.randn(20, 3), torch.arange(20) % 2)
        >>> Population.from_datasets({"ana": (data, data), "bob": (data, data)}).shape
        (3,)
        """
        columns = dataset_rows(users, name, workers=workers, cache=cache)
        rows, notices = make_rows(
            columns, name, user="user", split="split", classes=classes, layout=layout, scale=scale
        )
        return _population(rows, name, unseen, notices, task)

    @staticmethod
    def from_huggingface(
        dataset: Any,
        *,
        x: str,
        y: str,
        user: str = "",
        recording: str = "",
        split: str = "",
        unseen: Unseen = 1,
        test: float = 0.25,
        gap: int = 1,
        layout: Layout = "auto",
        scale: float = 0.0,
        length: int = 0,
        task: Encoder | None = None,
        name: str = "dataset",
    ) -> Population:
        """A population of a `datasets.Dataset`, or of the splits of a `datasets.DatasetDict`.

        Args:
            dataset: the data set.
            x: column of values.
            y: column of classes.
            user: column of users; empty if a partition makes the users.
            recording: column of the user's recordings; empty if unknown.
            split: column that says train, validation or test; empty for the splits of a `datasets.DatasetDict`, or to
                split each user's rows.
            unseen: as in `from_arrays`.
            test: fraction of a user's recordings (or rows) for testing, in (0, 1).
            gap: number of rows dropped before the test rows if recordings are unknown.
            layout: whether channels are the first or last axis of an example.
            scale: number by which values are divided; 0 for the largest value of 8-bit arrays and 16-bit images.
            length: number of steps to which series are cut or padded with zeros at the end; 0 for series of one length.
            task: the task whose targets ``y`` are, such as ``fedbn.tasks.Regression()``; None for classes.
            name: name of the data, for messages.

        Raises:
            UserError: data that cannot be used, or an unknown column.
        """
        columns = dataset_columns(dataset, name)
        split = split or ("split" if columns.find("split") else "")
        rows, notices = make_rows(
            columns,
            name,
            x=x,
            y=y,
            user=user,
            recording=recording,
            split=split,
            layout=layout,
            scale=scale,
            length=length,
        )
        return _population(rows, name, unseen, notices, task, test, gap)

    @staticmethod
    def from_federated(
        dataset: Any,
        *,
        x: str,
        y: str,
        split: str = "train",
        unseen: Unseen = 1,
        test: float = 0.25,
        gap: int = 0,
        layout: Layout = "auto",
        scale: float = 0.0,
        length: int = 0,
        task: Encoder | None = None,
        name: str = "federated data set",
    ) -> Population:
        """A population of a `flwr_datasets.FederatedDataset`: each partition of a split is a user.

        Args:
            dataset: the federated data set.
            x: column of values.
            y: column of classes.
            split: split whose partitioner makes the users.
            unseen: as in `from_arrays`.
            test: fraction of a user's rows for testing, in (0, 1).
            gap: number of rows dropped before the test rows.
            layout: whether channels are the first or last axis of an example.
            scale: number by which values are divided; 0 for the largest value of 8-bit arrays and 16-bit images.
            length: number of steps to which series are cut or padded with zeros at the end; 0 for series of one length.
            task: the task whose targets ``y`` are, such as ``fedbn.tasks.Regression()``; None for classes.
            name: name of the data, for messages.

        Raises:
            UserError: data that cannot be used or loaded, an unknown column, or a split without a partitioner.
        """
        columns, users = federated_columns(dataset, split, name)
        rows, notices = make_rows(columns, name, x=x, y=y, layout=layout, scale=scale, length=length)
        return _population(replace(rows, user=users), name, unseen, notices, task, test, gap)


def _population(
    rows: Rows,
    name: str,
    unseen: Unseen,
    notices: Sequence[str],
    task: Encoder | None,
    test: float = 0.25,
    gap: int = 1,
) -> Population:
    """Build a population whose unseen users are named, or drawn for each seed."""
    if task is not None and (isinstance(task, (str, type)) or not hasattr(task, "encode")):
        raise UserError(f"{name}: task must be an object such as fedbn.tasks.Regression(), not {task!r}")
    population = build_population(
        rows,
        name=name,
        test=test,
        gap=gap,
        unseen=unseen if isinstance(unseen, int) else 0,
        seed=0,
        skew=f"natural differences between the users of {name}",
        sources={},
        encode=encode_labels if task is None else task.encode,
        notices=notices,
    )
    if isinstance(unseen, int):
        return population
    names = [user.name for user in population.users]
    listed = [unseen] if isinstance(unseen, str) else [str(user) for user in unseen]
    if wrong := [user for user in listed if user not in names]:
        raise unknown(f"user in unseen= of {name}", wrong[0], names)
    if len(set(listed)) == len(names):
        raise UserError(f"{name}: all {len(names)} users are unseen, so nobody trains; leave some out of unseen=")
    held_out = {*population.unseen, *(names.index(user) for user in listed)}
    return replace(population, unseen=tuple(sorted(held_out)), held_out=None)


def build_population(
    rows: Rows,
    *,
    name: str,
    test: float,
    gap: int,
    unseen: int,
    seed: int,
    skew: str,
    sources: dict[str, str],
    least: int = 0,
    by_class: bool = True,
    encode: Encode = encode_labels,
    notices: Sequence[str] = (),
) -> Population:
    """Check the rows, split each user's rows, and hold out users.

    Args:
        rows: examples of all users.
        name: file name, for messages.
        test: fraction of a user's recordings (or rows) for testing.
        gap: number of rows dropped between training and test rows of one recording.
        unseen: number of users that never train. Users in the data set's test part only are the unseen ones instead.
        seed: determines who is unseen.
        skew: one sentence about the skew between users.
        sources: SHA-256 of the data by name.
        least: smallest number of rows of a user.
        by_class: whether to split by class where the last rows lack classes.
        encode: returns targets and class names from the column of targets.
        notices: what was decided in reading.

    Raises:
        UserError: if the data cannot be used for training. The message starts with ``name``.
    """
    found = build_users(rows, name, test, gap, least=least, by_class=by_class, encode=encode)
    users, classes = found.users, found.classes
    pooled = rows.user is None
    more = []
    drawn: int | None = None
    if found.test_only and len(found.test_only) < len(users):
        unseen_users = found.test_only
        names = list_names([users[i].name for i in unseen_users])
        more.append(f"{name}: the users of the test part only are unseen ({names})")
    else:
        drawn = 0 if pooled else unseen
        unseen_users = hold_out(len(users), drawn, seed)
    everything = (*notices, *found.notices, *more)
    return Population(
        tuple(users), unseen_users, classes, skew, sources, pooled=pooled, notices=everything, held_out=drawn
    )


def hold_out(users: int, unseen: int, seed: int, reserved: int = 0) -> tuple[int, ...]:
    """Indices of the unseen users: folds of one fixed shuffle, so that successive seeds hold out different users.

    The first ``reserved`` users of the shuffle, which the first seeds would hold out, are skipped.

    >>> sorted(hold_out(6, 2, 0) + hold_out(6, 2, 1) + hold_out(6, 2, 2))
    [0, 1, 2, 3, 4, 5]
    >>> hold_out(6, 2, 0, reserved=2) == hold_out(6, 2, 1)
    True
    """
    order = hold_out_order(users)[reserved:]
    if not 0 <= unseen < len(order):
        raise UserError(
            f"{unseen} unseen of {len(order)} users leaves no user for training; choose 0 to {max(0, len(order) - 1)}"
        )
    return tuple(sorted(order[(seed * unseen + i) % len(order)] for i in range(unseen)))


def hold_out_order(users: int) -> list[int]:
    """Fixed order in which users are held out, the same for all seeds."""
    order: list[int] = numpy_generator(0, "unseen users").permutation(users).tolist()
    return order

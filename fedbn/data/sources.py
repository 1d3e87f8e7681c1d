"""Rows from Python objects: arrays, map-style Datasets of PyTorch, data sets of Hugging Face and Flower."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from fedbn.data.columns import Columns, Rows, concatenate, split_names
from fedbn.data.lazy import is_mapped
from fedbn.data.readers import dataset_columns
from fedbn.data.values import Layout, channels_first, divisor_of, fit_length, read_values, rescale
from fedbn.errors import UserError

PARTS = ("train", "test")


def make_rows(
    columns: Columns,
    name: str,
    *,
    x: str = "x",
    y: str = "y",
    user: str = "",
    recording: str = "",
    split: str = "",
    classes: Sequence[str] = (),
    layout: Layout = "auto",
    scale: float = 0.0,
    length: int = 0,
) -> tuple[Rows, list[str]]:
    """Rows with their values brought to float32, channels first, as scenario ``files`` does; and notices.

    Values of memory-mapped arrays keep their type and their place on disk.

    Args:
        columns: the columns.
        name: name of the data, for messages.
        x: column of values.
        y: column of classes.
        user: column of users; empty if there is none.
        recording: column of recordings; empty if there is none.
        split: column of the parts of the data set; empty if there is none.
        classes: names of the classes if ``y`` holds their indices.
        layout: whether channels are the first or last axis of an example.
        scale: number by which values are divided; 0 for the largest value of 8-bit arrays and 16-bit images.
        length: number of steps to which series are cut or padded with zeros at the end; 0 for series of one length.

    Raises:
        UserError: an unknown column, or values that are no numbers.
    """
    values, moved = channels_first(read_values(columns, x, name, length), layout, name)
    if length and values.shape[-1] != length:
        values = fit_length(values, length)
    divisor = 1.0
    if is_mapped(values):  # converted when rows are read
        divisor, scaled = divisor_of(values, scale, name)
    else:
        values, scaled = rescale(values, scale, name)
    parts = split_names(columns.column(split, "split"), name, split) if split else None
    rows = Rows(
        values,
        columns.column(y, "y"),
        columns.column(user, "user") if user else None,
        columns.column(recording, "recording") if recording else None,
        tuple(classes) or columns.classes.get(y, ()),
        parts,
        scale=divisor,
    )
    return rows, [*columns.notices, *moved, *scaled]


def array_columns(name: str, **values: Any) -> Columns:
    """Columns of arrays, tensors or sequences; those that are None are left out.

    Raises:
        UserError: a value is no array, or one value instead of one per row.
    """
    given = {key: value for key, value in values.items() if value is not None}
    arrays = {key: _array(value, f"{name}: {key}", may_differ=key == "x") for key, value in given.items()}
    return Columns(list(arrays), arrays.__getitem__)


def _array(value: Any, what: str, *, may_differ: bool = False) -> np.ndarray:
    """An array; of objects if its rows have different shapes, which `read_values` brings to one shape or refuses."""
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu().numpy()
    try:
        return np.asanyarray(value)
    except ValueError:
        if may_differ:
            rows = np.empty(len(value), object)
            for i, row in enumerate(value):
                rows[i] = np.asarray(row)
            return rows
        raise UserError(f"{what} has rows of different shapes; bring them to one shape") from None


def dataset_rows(
    users: Mapping[str, tuple[Any, Any]], name: str, *, workers: int = 0, cache: str | Path | None = None
) -> Columns:
    """Columns ``x``, ``y``, ``user`` and ``split`` of map-style Datasets, with the rows of a user one after the other.

    Args:
        users: training and test Dataset of each user, with items ``(x, y)``; a training Dataset may be None.
        name: name of the data, for messages.
        workers: processes that load items.
        cache: file ``.npy`` for the values, which is then memory-mapped; None to keep them in memory.

    Raises:
        UserError: no user, items that are no pairs, change their shape or type, or differ when they are read again.
    """
    if not isinstance(users, Mapping) or not users:
        raise UserError(f"{name}: give a dictionary with a pair of Datasets (train, test) for each user")
    parts = []
    for user, pair in users.items():
        if not isinstance(pair, (tuple, list)) or len(pair) != 2:
            raise UserError(f"{name}: user {user!r} needs a pair of Datasets (train, test), not {type(pair).__name__}")
        for part, dataset in zip(PARTS, pair, strict=True):
            if dataset is None and part == "train":
                continue
            if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
                raise UserError(
                    f"{name}: the {part} data of user {user!r} are a {type(dataset).__name__}, not a map-style Dataset "
                    "with __len__ and __getitem__"
                )
            parts.append((f"{name}: user {user!r}, {part} item", str(user), part, dataset))
    sizes = [len(dataset) for *_, dataset in parts]
    x, labels = _read_items([(what, dataset) for what, _, _, dataset in parts], sum(sizes), workers, cache)
    names = {"user": np.repeat([user for _, user, _, _ in parts], sizes)}
    columns = names | {"split": np.repeat([part for _, _, part, _ in parts], sizes), "x": x, "y": labels}
    return Columns(list(columns), columns.__getitem__)


def _read_items(
    datasets: Sequence[tuple[str, Any]], count: int, workers: int, cache: str | Path | None
) -> tuple[np.ndarray, np.ndarray]:
    x: np.ndarray | None = None
    labels: list[Any] = []
    for what, dataset in datasets:
        for index, (value, label) in enumerate(_items(what, dataset, workers)):
            if x is None:
                shape, kind = (count, *value.shape), value.dtype
                x = np.empty(shape, kind) if cache is None else np.lib.format.open_memmap(cache, "w+", kind, shape)
            if value.shape != x.shape[1:] or value.dtype != x.dtype:
                raise UserError(
                    f"{what} {index} is {value.dtype} of shape {list(value.shape)}, but the first item of the data is "
                    f"{x.dtype} of shape {list(x.shape[1:])}; bring all items to one shape and type"
                )
            x[len(labels)] = value
            labels.append(label)
        _check_repeatable(what, dataset)
    if x is None:
        raise UserError(f"{datasets[0][0].split(':')[0]}: the Datasets have no items")
    return x, _array(labels, f"{datasets[0][0].split(':')[0]}: y")


def _items(what: str, dataset: Any, workers: int) -> Iterator[tuple[np.ndarray, Any]]:
    items: Iterable[Any] = (dataset[i] for i in range(len(dataset)))
    if workers:
        items = DataLoader(
            dataset, batch_size=None, num_workers=workers, collate_fn=_unchanged, generator=torch.Generator()
        )
    for index, item in enumerate(items):
        yield _pair(item, f"{what} {index}")


def _unchanged(item: Any) -> Any:
    return item


def _pair(item: Any, what: str) -> tuple[np.ndarray, Any]:
    if not isinstance(item, (tuple, list)) or len(item) != 2:
        raise UserError(f"{what} is a {type(item).__name__}, but a pair (x, y) is needed")
    value, label = item
    array = _array(value, what)
    if array.dtype.kind not in "biuf":
        raise UserError(f"{what} has values of type {array.dtype}, but numbers are needed: add a transform to tensors")
    label = label.detach().cpu().numpy() if isinstance(label, torch.Tensor) else label
    return array, label.item() if isinstance(label, np.ndarray) and label.ndim == 0 else label


def _check_repeatable(what: str, dataset: Any) -> None:
    if len(dataset) and not np.array_equal(_pair(dataset[0], what)[0], _pair(dataset[0], what)[0]):
        raise UserError(
            f"{what} 0 has other values when it is read again, as with a random transform: leave random transforms out "
            "of the Dataset"
        )


def federated_columns(dataset: Any, split: str, name: str) -> tuple[Columns, np.ndarray]:
    """Columns of all partitions of a split, and the user of each row.

    Args:
        dataset: a `flwr_datasets.FederatedDataset`.
        split: the split that has a partitioner.
        name: name of the data, for messages.

    Raises:
        UserError: no such partitioner, or the data cannot be loaded.
    """
    partitioners = getattr(dataset, "partitioners", None)
    if not partitioners or split not in partitioners:
        known = ", ".join(partitioners or ()) or "none"
        raise UserError(f"{name}: split {split!r} has no partitioner (splits with one: {known}); set split=NAME")
    try:
        first = dataset.load_partition(0, split)
        count = dataset.partitioners[split].num_partitions
        tables = [first, *(dataset.load_partition(i, split) for i in range(1, count))]
    except Exception as error:  # connection, unknown name, too few rows: each library has its own exceptions
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{name}: the partitions of {split!r} cannot be loaded ({reason})") from error
    natural = getattr(dataset.partitioners[split], "partition_id_to_natural_id", None) or {}
    digits = len(str(count - 1))
    users = np.repeat([str(natural.get(i, f"{i:0{digits}d}")) for i in range(count)], [len(t) for t in tables])
    parts = [dataset_columns(table, name) for table in tables]

    def get(column: str) -> np.ndarray:
        return concatenate([part.get(column) for part in parts], column, name)

    return Columns(parts[0].names, get, parts[0].classes), users

"""Read the columns of npz, csv and parquet files and of directories saved by `datasets`."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np

from fedbn.data.columns import Columns, concatenate, join, split_of
from fedbn.data.packages import sha256
from fedbn.data.values import stack
from fedbn.errors import UserError

TEXT_SUFFIXES = (".csv", ".tsv", ".txt", ".dat")
SUFFIXES = (".npz", ".parquet", *TEXT_SUFFIXES)
COMPRESSED = (".gz", ".bz2", ".xz", ".zip")

PICKLES = (".pkl", ".pickle", ".pt", ".pth", ".joblib")


def suffix_of(path: Path) -> str:
    """Suffix of a data file without that of its compression, in lower case.

    >>> suffix_of(Path("walks.CSV.gz"))
    '.csv'
    """
    parts = [part.lower() for part in path.suffixes[-2:]]
    return parts[0] if len(parts) == 2 and parts[1] in COMPRESSED and parts[0] in TEXT_SUFFIXES else (parts or [""])[-1]


def is_saved_dataset(path: Path) -> bool:
    """Whether a directory was written by ``save_to_disk`` of Hugging Face ``datasets``."""
    return any((path / name).exists() for name in ("state.json", "dataset_dict.json"))


def read_file(path: Path) -> Columns:
    """Open a file in the format given by its suffix, or a directory saved by `datasets`.

    Raises:
        UserError: if the suffix is unknown, or the content does not match the suffix.
    """
    suffix = suffix_of(path)
    readers = {".npz": _npz, ".parquet": _parquet, **dict.fromkeys(TEXT_SUFFIXES, _text)}
    reader = _saved_dataset if path.is_dir() else readers.get(suffix)
    if reader is None:
        reason = "a pickle can run programs; save arrays with numpy.savez" if suffix in PICKLES else "convert the file"
        raise UserError(
            f"{path.name}: data are read from .npz, .csv, .parquet, a directory of these, or a directory of "
            f"datasets.save_to_disk, not from {path.suffix or 'a file without suffix'!r}; {reason}"
        )
    try:
        return reader(path)
    except UserError:
        raise
    except Exception as error:  # every parser has its own exceptions
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path.name} cannot be read ({reason}); write it again or check its suffix") from error


def _npz(path: Path) -> Columns:
    with np.load(path, allow_pickle=False) as file:
        arrays = {}
        for name in file.files:
            try:
                arrays[name] = file[name]
            except ValueError:
                raise UserError(
                    f"{path.name}: array {name!r} holds Python objects, for instance rows of different lengths; bring "
                    "all rows to one length and save plain numbers or strings"
                ) from None
    arrays = _join_splits(arrays, path.name)
    return Columns(list(arrays), arrays.__getitem__)


def _join_splits(arrays: dict[str, np.ndarray], name: str) -> dict[str, np.ndarray]:
    """Join arrays such as x_train and x_test to x, and name the part of each row in ``split``."""
    parts: dict[str, dict[str, np.ndarray]] = {}
    for key, values in arrays.items():
        first, last = key.split("_")[0], key.split("_")[-1]
        for token, base in ((last, key[: -len(last) - 1]), (first, key[len(first) + 1 :])):
            if base and values.ndim and (split := split_of(token)):
                parts.setdefault(split, {})[base] = values
                break
    if "train" not in parts or len(parts) < 2 or "split" in arrays:
        return arrays
    bases = list(parts["train"])
    if any(set(part) != set(bases) for part in parts.values()):
        raise UserError(
            f"{name}: its parts {', '.join(parts)} have different arrays ({', '.join(sorted(arrays))}); save the same "
            "arrays for each part"
        )
    joined = {base: concatenate([part[base] for part in parts.values()], base, name) for base in bases}
    sizes = [len(part[bases[0]]) for part in parts.values()]
    return joined | {"split": np.repeat(list(parts), sizes)}


def _text(path: Path) -> Columns:
    from fedbn.data.tables import read_text_table

    frame, has_header, notices = read_text_table(path)
    n = len(frame.columns)
    hint = (
        ""
        if has_header
        else (
            f". {path.name} has no header line, so its columns are numbered from 0: name them by numbers, for instance "
            f"x=0..{max(0, n - 3)}:y={max(0, n - 2)}:user={n - 1}, or add a header"
        )
    )
    return _frame(frame, path.name, tuple(notices), hint)


def _parquet(path: Path) -> Columns:
    import pandas as pd

    frame = pd.read_parquet(path)
    stored = [name for name in frame.index.names if name is not None and name not in frame.columns]
    return _frame(frame.reset_index(level=stored) if stored else frame, path.name)


def _frame(frame: Any, name: str, notices: tuple[str, ...] = (), hint: str = "") -> Columns:
    names = [str(column) for column in frame.columns]
    if twice := next((n for n in names if names.count(n) > 1), None):
        raise UserError(f"{name}: column {twice!r} occurs twice; rename one")
    columns = dict(zip(names, range(len(names)), strict=True))
    return Columns(names, lambda column: np.array(frame.iloc[:, columns[column]]), {}, notices, hint)


def _saved_dataset(path: Path) -> Columns:
    import datasets

    return dataset_columns(datasets.load_from_disk(str(path)), path.name, path)


def dataset_columns(data: Any, name: str, path: Path | None = None) -> Columns:
    """The columns of a `datasets.Dataset`, or of all splits of a `datasets.DatasetDict`.

    Args:
        data: the data set.
        name: its name, for messages.
        path: directory of the data set, for messages; None if it is an object.

    Raises:
        UserError: the splits are not train, validation and test.
    """
    import datasets

    if not isinstance(data, datasets.DatasetDict):
        return _dataset(data, name)
    if len(data) == 1:
        return _dataset(next(iter(data.values())), name)
    splits = {split: split_of(split) for split in data}
    if None in splits.values():
        fix = f"name one: path={path / next(iter(data))}" if path else "pass one of them"
        raise UserError(
            f"{name} holds {len(data)} splits ({', '.join(data)}), which are not train, validation and test; {fix}"
        )
    return join({str(splits[split]): _dataset(part, name) for split, part in data.items()}, "split", name)


def _dataset(table: Any, name: str) -> Columns:
    import datasets
    import pandas as pd

    classes = {n: tuple(f.names) for n, f in table.features.items() if isinstance(f, datasets.ClassLabel)}

    def get(column: str) -> np.ndarray:
        if isinstance(table.features[column], datasets.Image):
            return _images(table, column, name)
        stored = table.with_format("arrow")[column][:]
        # The NumPy format fails on missing lists without their position; as objects they can be located.
        if stored.null_count:
            return pd.Series(stored.to_pylist(), dtype=object).to_numpy()
        return np.asarray(table.with_format("numpy")[column][:])

    return Columns(table.column_names, get, classes)


def _images(table: Any, column: str, name: str) -> np.ndarray:
    """Images as ``[n, channels, height, width]``, 8 or 16 bits per value."""
    arrays: list[np.ndarray | None] = []
    for i in range(len(table)):
        try:
            image = table.with_format(None)[i][column]
        except OSError as error:
            raise UserError(f"{name}: {column!r} holds an image that cannot be decoded; save it again") from error
        # Palette indices and inks are no colors.
        mode = {"P": "RGB", "PA": "RGBA", "CMYK": "RGB", "YCbCr": "RGB", "HSV": "RGB", "LAB": "RGB", "1": "L"}
        array = None if image is None else np.asarray(image.convert(mode.get(image.mode, image.mode)))
        arrays.append(array.astype(np.uint16) if array is not None and array.dtype == np.int32 else array)
    if len(types := {str(a.dtype) for a in arrays if a is not None}) > 1:
        raise UserError(f"{name}: {column!r} mixes images of {' and '.join(sorted(types))}; save all in one type")
    images = stack(arrays, column, name)
    return images[:, None] if images.ndim == 3 else images.transpose(0, 3, 1, 2)


def content_digest(path: Path) -> str:
    """SHA-256 of a file, or of all data files in a directory and their names."""
    if path.is_file():
        return sha256(path)
    files = sorted(p for p in path.rglob("*") if p.is_file())
    if is_saved_dataset(path):
        return hashlib.sha256("".join(sha256(p) for p in files if p.suffix == ".arrow").encode()).hexdigest()
    named = (f"{p.relative_to(path).as_posix()}:{sha256(p)}" for p in files if suffix_of(p) in SUFFIXES)
    return hashlib.sha256("\n".join(named).encode()).hexdigest()

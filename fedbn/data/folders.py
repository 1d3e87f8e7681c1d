"""Read a data set from a file, or from a directory with one file per user, per recording or per part of the data."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fedbn.data.columns import Columns, concatenate, split_of
from fedbn.data.readers import COMPRESSED, SUFFIXES, is_saved_dataset, read_file, suffix_of
from fedbn.errors import UserError

IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp")


def read(path: Path) -> Columns:
    """Open a file, a directory of files, or a directory saved by `datasets`.

    Names of files and directories give what the files have no column for: ``split`` (directories or files train,
    test, ...), ``user`` (one file or directory per user), and ``recording`` (several files in the directory of a user).

    Raises:
        UserError: if there is no such file, it cannot be read, or files have different columns.
    """
    if not path.exists():
        raise UserError(f"there is no file {str(path)!r}; check path=, which is relative to the current directory")
    if not path.is_dir() or is_saved_dataset(path):
        return read_file(path)
    files = [p for p in sorted(path.rglob("*"), key=_natural) if _is_data(p, path)]
    # Next to tables, text files are descriptions.
    files = [p for p in files if suffix_of(p) not in (".txt", ".dat")] or files
    if not files:
        images = any(p.suffix.lower() in IMAGES for p in path.rglob("*"))
        fix = (
            f"read directories of images with hub:data={path.name}:path={path}"
            if images
            else "save .npz, .csv or .parquet files there, for instance one per user"
        )
        raise UserError(f"{path.name} holds no data files; {fix}")
    return _join(path.name, files, _origins(path, files))


def _is_data(file: Path, root: Path) -> bool:
    hidden = any(part.startswith((".", "_")) for part in file.relative_to(root).parts)
    return file.is_file() and suffix_of(file) in SUFFIXES and not hidden


def _natural(path: Path) -> list[tuple[int, str]]:
    """Sort key by which user2 comes before user10."""
    return [(int(part or 0), "") if part.isdigit() else (0, part) for part in re.split(r"(\d+)", path.as_posix())]


def _origins(root: Path, files: Sequence[Path]) -> dict[str, np.ndarray]:
    """Split, user and recording of each file, as far as names of files and directories tell them."""
    names = [_names(file.relative_to(root)) for file in files]
    splits, rest = zip(*(_take_split(parts) for parts in names), strict=True)
    found: dict[str, np.ndarray] = {}
    if None not in splits and "train" in splits and len(set(splits)) > 1:
        found["split"] = np.array(splits)
        names = list(rest)
    if len({parts[0] for parts in names if parts}) > 1 and all(names):
        found["user"] = np.array([parts[0] for parts in names])
        if any(len(parts) > 1 for parts in names):
            found["recording"] = np.array(["/".join(parts[1:]) for parts in names])
    return found


def _names(file: Path) -> tuple[str, ...]:
    """Names of directories and file without suffixes, and without the parts that only number pieces of a file."""
    stem = file.name
    for suffix in (*COMPRESSED, *SUFFIXES):
        stem = stem[: -len(suffix)] if stem.lower().endswith(suffix) else stem
    stem = re.sub(r"[-_]?\d{3,}-of-\d{3,}$|^(part|shard|chunk)[-_]?\d+.*$", "", stem)
    # Partitioned parquet directories are named user=ana.
    parts = [part.rpartition("=")[2] for part in (*file.parts[:-1], stem)]
    return tuple(part for part in parts if part and part != "data")


def _take_split(parts: tuple[str, ...]) -> tuple[str | None, tuple[str, ...]]:
    """The split that a name stands for, or begins or ends with, and the other names."""
    for i, part in enumerate(parts):
        words = re.split(r"([-_. ])", part)
        for place in (0, -1):
            if split := split_of(words[place]):
                rest = "".join(words[2:] if place == 0 else words[:-2])
                return split, (*parts[:i], *([rest] if rest else []), *parts[i + 1 :])
    return None, parts


def _join(name: str, files: Sequence[Path], origins: dict[str, np.ndarray]) -> Columns:
    parts = [read_file(file) for file in files]
    names = list(dict.fromkeys(n for part in parts for n in part.names))
    added = {column: values for column, values in origins.items() if column not in names}
    sizes = [len(part.get(part.names[0])) if part.names else 0 for part in parts]

    def get(column: str) -> np.ndarray:
        if column in added:
            return np.repeat(added[column], sizes)
        for file, part in zip(files, parts, strict=True):
            if column not in part.names:
                raise UserError(
                    f"{name}: {file.name} has no column {column!r} but {', '.join(part.names)}; give all files the "
                    "same columns"
                )
        filled = [part.get(column) for part, size in zip(parts, sizes, strict=True) if size]
        return concatenate(filled, column, name) if filled else parts[0].get(column)

    notices = list(dict.fromkeys(n for part in parts for n in part.notices))
    if empty := [file.name for file, size in zip(files, sizes, strict=True) if not size]:
        notices.append(f"{name}: {', '.join(empty)} without rows, left out")
    if added:
        notices.append(f"{name}: {', '.join(added)} of each row from the names of files and directories")
    return Columns([*names, *added], get, {}, tuple(notices), parts[0].hint)

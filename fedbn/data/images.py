"""Image data sets in their published binary formats: IDX (MNIST and its relatives) and the binary version of CIFAR.

Both formats are plain bytes. Nothing is unpickled.
"""

from __future__ import annotations

import gzip
import hashlib
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fedbn.errors import UserError

PARTS = ("train", "test")


@dataclass(frozen=True)
class ImageSet:
    """Images in 8 bits with their class numbers.

    Attributes:
        images: ``[n, channels, height, width]``, training images first.
        labels: ``[n]``.
        split: ``train`` or ``test`` for each row.
        classes: names of the classes if the files have them.
        notices: what is unusual about the files.
    """

    images: np.ndarray
    labels: np.ndarray
    split: np.ndarray
    classes: tuple[str, ...] = ()
    notices: tuple[str, ...] = ()

    @property
    def digest(self) -> str:
        """SHA-256 of all images and labels, one byte each."""
        return hashlib.sha256(self.images.tobytes() + self.labels.astype(np.uint8).tobytes()).hexdigest()


def read_idx(path: Path) -> np.ndarray:
    """Array of bytes in an IDX file, which may be compressed with gzip (``.gz``).

    The file starts with two zero bytes, the type (8: unsigned byte), the number of axes and, as big-endian numbers of
    32 bits, the sizes of the axes (LeCun, Cortes, Burges, *The MNIST database*, http://yann.lecun.com/exdb/mnist).

    Raises:
        UserError: the file cannot be read, or is no IDX file of bytes.
    """
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} cannot be read ({error}); download it again") from None
    axes = data[3] if len(data) > 3 else 0
    start = 4 + 4 * axes
    if data[:3] != b"\0\0\x08" or not 1 <= axes <= 4 or len(data) < start:
        raise UserError(f"{path} is not an IDX file of bytes; download it again")
    shape = [int(n) for n in np.frombuffer(data, ">u4", axes, 4)]
    values = np.frombuffer(data, np.uint8, offset=start)
    if len(values) != np.prod(shape, dtype=object):
        raise UserError(f"{path} has {len(values)} bytes of data, but its header says {shape}; download it again")
    return values.reshape(shape)


def read_idx_set(directory: Path, prefix: str = "") -> ImageSet:
    """The four files of MNIST or of a data set in its format.

    Args:
        directory: directory of the files.
        prefix: what the names start with, such as ``emnist-balanced-``.

    Raises:
        UserError: a file is missing or damaged, or numbers of images and labels differ.
    """
    parts = []
    for part, names in (("train", ("train",)), ("test", ("t10k", "test"))):
        images, labels = (
            read_idx(_find(directory, [f"{prefix}{name}-{kind}-ubyte" for name in names]))
            for kind in ("images-idx3", "labels-idx1")
        )
        if images.ndim != 3 or labels.shape != images.shape[:1]:
            raise UserError(
                f"{directory}: the {part} images have shape {list(images.shape)} and their labels "
                f"{list(labels.shape)}, which do not belong together; download the files again"
            )
        parts.append((images[:, None], labels))
    return _joined(directory, parts)


def _find(directory: Path, names: list[str]) -> Path:
    """The first file of these names, also with a dot before ``idx`` or compressed."""
    spellings = [f"{n}{end}" for name in names for n in (name, name.replace("-idx", ".idx")) for end in ("", ".gz")]
    for spelling in spellings:
        if (path := directory / spelling).is_file():
            return path
    raise UserError(f"{directory} has no file {spellings[0]} or {spellings[1]}")


def read_cifar(directory: Path) -> ImageSet:
    """CIFAR-10 or CIFAR-100 in the binary version; CIFAR-100 has its 100 fine classes.

    A row is the class (CIFAR-100: coarse, then fine class) and 3,072 bytes of red, green and blue pixels
    (Krizhevsky 2009, https://www.cs.toronto.edu/~kriz/cifar.html).

    Raises:
        UserError: the directory has another version, or a file is missing or damaged.
    """
    if (directory / "data_batch_1.bin").is_file():
        files = [[f"data_batch_{i}.bin" for i in range(1, 6)], ["test_batch.bin"]]
        labels, names = 1, "batches.meta.txt"
    elif (directory / "train.bin").is_file():
        files, labels, names = [["train.bin"], ["test.bin"]], 2, "fine_label_names.txt"
    else:
        pickled = any((directory / name).exists() for name in ("data_batch_1", "train", "batches.meta", "meta"))
        raise UserError(
            f"{directory} has the Python version of CIFAR, whose pickles can run any code: download the binary version "
            "(cifar-10-binary.tar.gz or cifar-100-binary.tar.gz) and give its directory as path="
            if pickled
            else f"{directory} has neither data_batch_1.bin (CIFAR-10) nor train.bin (CIFAR-100): unpack "
            "cifar-10-binary.tar.gz or cifar-100-binary.tar.gz and give its directory as path="
        )
    parts = []
    for part in files:
        rows = np.concatenate([_cifar_rows(directory / name, labels + 3072) for name in part])
        parts.append((rows[:, labels:].reshape(-1, 3, 32, 32), rows[:, labels - 1]))
    found = directory / names
    classes = tuple(found.read_text(encoding="utf-8").split()) if found.is_file() else ()
    return _joined(directory, parts, classes)


def _cifar_rows(path: Path, width: int) -> np.ndarray:
    try:
        data = np.frombuffer(path.read_bytes(), np.uint8)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); unpack the archive again") from None
    if not len(data) or len(data) % width:
        raise UserError(f"{path} has {len(data)} bytes, which is no multiple of {width}; unpack the archive again")
    return data.reshape(-1, width)


def _joined(directory: Path, parts: list[tuple[np.ndarray, np.ndarray]], classes: tuple[str, ...] = ()) -> ImageSet:
    if parts[0][0].shape[1:] != parts[1][0].shape[1:]:
        raise UserError(f"{directory}: training and test images differ in size; download the files again")
    images, labels = (np.concatenate(values) for values in zip(*parts, strict=True))
    return ImageSet(images, labels.astype(np.int64), np.repeat(PARTS, [len(y) for _, y in parts]), classes)

"""Hub: image data sets from the Hugging Face hub, by name, through flwr-datasets.

The data set defines the users: writers (femnist), visual domains (pacs, office-home), hospitals (fed-isic2019), or
whole data sets (digits-four and digits-five, the domains of FedBN, Li et al., 2021, https://arxiv.org/abs/2102.07623).
If the data set has no users (cifar10), rows are assigned at random; choose a partition in addition. Any other data set
of images is given by its identifier: ``hub:data=owner/name:x=image:y=label:user=domain:size=32``.

The splits ``train`` and ``test`` of a data set are used as they are. A data set without a test split is split per user,
so that every user has test data. Files on the hub are often sorted by class and images are independent of each other,
so each user's rows are first put into a fixed random order. MNIST-M is derived from MNIST, so a digit can occur in both
domains of digits-four; scenario ``digits`` separates them.

Some domains have no copy on the hub from their authors or from Flower. Office-Caltech10 and the synthetic digits of
Digits-Five are archives from their authors: unpack them into ``path``, one directory per domain with one subdirectory
per class. Domains that are missing there are loaded from the hub.

Without a connection, ``path`` is a directory with the same columns, in a format of ``save_to_disk`` or
``datasets.load_dataset``.
"""

from __future__ import annotations

import contextlib
import hashlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from fedbn.data.columns import Rows
from fedbn.data.labels import refuse_missing
from fedbn.data.population import Population, build_population
from fedbn.errors import UserError, unknown
from fedbn.scenarios.base import Scenario
from fedbn.seeds import numpy_generator


@dataclass(frozen=True)
class Part:
    """A data set of the hub.

    Attributes:
        dataset: identifier; empty if the hub has no reliable copy, so that it is read from ``path``.
        x: column of images.
        y: column of class numbers.
        user: column of users; if empty, see ``domain``.
        domain: name of the single user that has the whole data set; if empty, rows are assigned at random.
        subset: configuration, if the data set has several.
    """

    dataset: str
    x: str = "image"
    y: str = "label"
    user: str = ""
    domain: str = ""
    subset: str | None = None


@dataclass(frozen=True)
class Collection:
    """A named collection: its parts, the shape of resized images, and the skew between users."""

    parts: tuple[Part, ...]
    shape: tuple[int, int, int]
    skew: str


DIGITS = (
    Part("ylecun/mnist", domain="mnist"),
    Part("flwrlabs/usps", domain="usps"),
    Part("ufldl-stanford/svhn", domain="svhn", subset="cropped_digits"),
    Part("Mike0307/MNIST-M", domain="mnistm"),
)

COLLECTIONS: dict[str, Collection] = {
    "femnist": Collection(
        (Part("flwrlabs/femnist", y="character", user="writer_id"),),
        (1, 28, 28),
        "natural feature, label and quantity skew between writers",
    ),
    "pacs": Collection(
        (Part("flwrlabs/pacs", user="domain"),),
        (3, 64, 64),
        "natural feature skew between photographs, art, cartoons and sketches; some label skew",
    ),
    "office-home": Collection(
        (Part("flwrlabs/office-home", user="domain"),),
        (3, 64, 64),
        "natural feature skew between art, clip art, product pictures and photographs",
    ),
    "fed-isic2019": Collection(
        (Part("flwrlabs/fed-isic2019", user="center"),),
        (3, 64, 64),
        "natural feature, label and quantity skew between hospitals",
    ),
    "digits-four": Collection(DIGITS, (3, 28, 28), "natural feature skew between four data sets of digits"),
    "digits-five": Collection(
        (*DIGITS, Part("", domain="synth")), (3, 28, 28), "natural feature skew between five data sets of digits"
    ),
    "office-caltech10": Collection(
        tuple(Part("", domain=domain) for domain in ("amazon", "caltech", "dslr", "webcam")),
        (3, 64, 64),
        "natural feature skew between shop pictures, Caltech-256, a camera and a web camera; quantity skew",
    ),
    "cifar10": Collection((Part("uoft-cs/cifar10", x="img"),), (3, 32, 32), "none: rows dealt at random"),
}


@dataclass(frozen=True)
class Hub(Scenario):
    """Images ``[channels, size, size]`` in [-1, 1] from the Hugging Face hub.

    Attributes:
        data: name in `COLLECTIONS`, or an identifier such as ``owner/name``.
        path: local directory to read instead; for several parts, one subdirectory per domain.
        x: column of images; empty for the default of the collection.
        y: column of class numbers; empty for the default of the collection.
        user: column of users; empty for the default of the collection.
        size: image size in pixels; 0 for the default of the collection.
        users: maximum number of users, the same random selection in every run.
        limit: maximum number of rows per user; none for all.
        test: fraction of a user's rows for testing, if the data set has no test split.
        unseen: number of users that never train.
    """

    name: ClassVar[str] = "hub"
    about: ClassVar[str] = "image data sets by name, e.g. femnist or cifar10 (downloads)"
    model: ClassVar[str] = "resnet20"

    data: str = "pacs"
    path: str = ""
    x: str = ""
    y: str = ""
    user: str = ""
    size: int = 0
    users: int = 20
    limit: int | None = 500
    test: float = 0.2
    unseen: int = 1

    def load(self, seed: int) -> Population:
        collection = self._collection()
        parts = [self._rows(part, collection) for part in collection.parts]
        class_names = {p.classes for p in parts if p.classes}
        if len(class_names) > 1:
            listed = " / ".join(", ".join(classes) for classes in sorted(class_names))
            raise UserError(
                f"{self.data}: class names differ between domains ({listed}); use the same directories in all"
            )
        rows = Rows.concat(parts)
        refuse_missing(rows.y, f"{self.data}: label")
        labels = rows.y.astype(np.int64 if rows.y.dtype.kind in "biuf" else np.str_)
        sources = {f"hub/{self.data}": hashlib.sha256(rows.x.tobytes() + labels.tobytes()).hexdigest()}
        skew = collection.skew
        return build_population(
            rows,
            name=self.data,
            test=self.test,
            gap=0,
            unseen=self.unseen,
            seed=seed,
            skew=skew,
            sources=sources,
            by_class=False,
        )

    def _collection(self) -> Collection:
        if self.size < 0 or self.users < 1 or (self.limit is not None and self.limit < 3):
            raise UserError(
                f"hub: size={self.size}, users={self.users}, limit={self.limit}: choose a size of 0 (default) "
                "or more, 1 user or more, and 3 rows per user or more"
            )
        if self.data in COLLECTIONS:
            collection = COLLECTIONS[self.data]
        elif "/" in self.data or self.path:
            collection = Collection(
                (Part(self.data),), (3, 32, 32), f"natural differences between the users of {self.data}"
            )
        else:
            raise unknown("data set of scenario 'hub' (or give owner/name)", self.data, COLLECTIONS)
        columns = {k: v for k in ("x", "y", "user") if (v := getattr(self, k))}
        shape = (collection.shape[0], self.size, self.size) if self.size else collection.shape
        return replace(collection, parts=tuple(replace(p, **columns) for p in collection.parts), shape=shape)

    def _rows(self, part: Part, collection: Collection) -> Rows:
        several = len(collection.parts) > 1
        directory = Path(self.path, part.domain if several else "")
        if not part.dataset and not (self.path and directory.is_dir()):
            raise UserError(
                f"{self.data}: domain {part.domain!r} has no reliable copy on the hub; unpack its authors' archive "
                f"and set path=DIR, where DIR/{part.domain} has one directory of images per class"
            )
        # Missing domains of a collection are loaded from the hub.
        local = self.path and (directory.is_dir() or not several)
        table, split = _join(_load_local(directory) if local else _load_online(part))
        for option in ("x", "y", "user"):
            column = getattr(part, option)
            if column and column not in table.column_names:
                raise UserError(
                    f"{unknown(f'column of {self.data}', column, table.column_names)}. Set it with {option}=NAME"
                )
        owners = self._owners(part, table)
        rng = numpy_generator(0, "hub", self.data, part.domain)
        names = rng.permutation(np.unique(owners))[: self.users]
        index = np.concatenate([rng.permutation(np.flatnonzero(owners == n))[: self.limit] for n in names])
        selected = table.select(index)
        feature = table.features[part.y]
        return Rows(
            x=_pixels(selected, part.x, collection.shape, self.data),
            y=np.asarray(selected[part.y][:]),
            user=owners[index],
            recording=None,
            classes=tuple(getattr(feature, "names", None) or ()),
            split=None if split is None else split[index],
        )

    def _owners(self, part: Part, table: Any) -> np.ndarray:
        """User of each row."""
        if part.user:
            users = np.asarray(table[part.user][:])
            refuse_missing(users, f"{self.data}: user")
            return users.astype(str)
        if part.domain:
            return np.full(len(table), part.domain)
        users = numpy_generator(0, "hub", self.data, "deal").permutation(len(table)) % self.users
        return np.array([f"user{i:03d}" for i in users])


def _join(tables: dict[str, Any]) -> tuple[Any, np.ndarray | None]:
    """One table of all splits, and the split of each row; None if there is only one."""
    import datasets

    if len(tables) == 1:
        return next(iter(tables.values())), None
    split = np.repeat(list(tables), [len(table) for table in tables.values()])
    return datasets.concatenate_datasets(list(tables.values())), split


def _load_online(part: Part) -> dict[str, Any]:
    """The splits train and test (if there is one), in the order of the hub."""
    from flwr_datasets import FederatedDataset

    try:
        hub = FederatedDataset(dataset=part.dataset, subset=part.subset, partitioners={"train": 1}, shuffle=False)
        tables = {"train": hub.load_split("train")}
        with contextlib.suppress(ValueError):  # there is no such split
            tables["test"] = hub.load_split("test")
        return tables
    except Exception as error:  # connection, authentication, unknown name: each library has its own exceptions
        reason = (str(error).splitlines() or [""])[0][:200]
        raise UserError(
            f"cannot load {part.dataset!r} from the hub ({type(error).__name__}: {reason}). Check name and connection. "
            f"To work offline, run datasets.load_dataset({part.dataset!r}, split='train').save_to_disk(DIR) on a "
            "machine with a connection, copy DIR here and add path=DIR; or use a scenario that needs no download: "
            "digits8, digits, hapt, watch"
        ) from error


def _load_local(path: Path) -> dict[str, Any]:
    import datasets

    if not path.is_dir():
        raise UserError(f"there is no directory {str(path)!r}; path= must be a directory written by save_to_disk")
    try:
        is_saved = any((path / name).exists() for name in ("state.json", "dataset_dict.json"))
        data = datasets.load_from_disk(str(path)) if is_saved else datasets.load_dataset(str(path))
    except Exception as error:  # every format has its own exceptions
        reason = (str(error).splitlines() or [""])[0]
        raise UserError(f"{path} cannot be read as a data set ({reason}); write it with save_to_disk") from error
    if isinstance(data, datasets.DatasetDict):
        if "train" not in data:
            raise UserError(f"{path} has no split 'train' but {', '.join(data)}; name the split: {path}/SPLIT")
        return {name: data[name] for name in ("train", "test") if name in data}
    return {"train": data}


def _pixels(table: Any, column: str, shape: tuple[int, int, int], name: str) -> np.ndarray:
    """Images as float32 ``[n, *shape]`` in [-1, 1], resized with bilinear interpolation."""
    from PIL import Image

    channels, height, width = shape
    out = np.empty((len(table), *shape), np.float32)
    for i in range(len(table)):
        try:
            image = table[i][column]
        except OSError as error:
            raise UserError(
                f"{name}: column {column!r} holds an image that cannot be decoded; save it again"
            ) from error
        if not isinstance(image, Image.Image):
            raise UserError(f"{name}: column {column!r} holds no images but {type(image).__name__}; set x=COLUMN")
        resized = image.convert("L" if channels == 1 else "RGB").resize((width, height), Image.Resampling.BILINEAR)
        pixels = np.asarray(resized, np.float32).reshape(height, width, channels)
        out[i] = pixels.transpose(2, 0, 1) / 127.5 - 1
    return out

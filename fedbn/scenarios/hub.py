"""Hub: image data sets by name, through flwr-datasets, for people who are online.

A user is whatever the data set knows: a writer (femnist), a visual domain (pacs, office-home), a hospital
(fed-isic2019), a data set of its own (digits-four and digits-five, the domains of FedBN, Li et al., 2021,
https://arxiv.org/abs/2102.07623). Where it knows nothing (cifar10), rows are dealt at random; choose a
partition on top. Any other data set of images is named by its identifier:
``hub:data=owner/name:x=image:y=label:user=domain:size=32``.

Only the ``train`` split is used, and split again per user, so that every user has data of their own to be
tested on. Hub files are often sorted by class and images are independent of each other, so each user's
rows are put into one fixed random order first. MNIST-M is made from MNIST, so a digit can occur in both
domains of digits-four; scenario ``digits`` keeps them apart.

Not every domain has a copy on the hub that its authors or Flower's have put there. Office-Caltech10 and the
synthetic digits of Digits-Five come as archives from their authors: unpack them into ``path``, one directory
a domain with one directory a class in it. Domains that are not there come from the hub.

Without a connection, ``path`` names a directory with the same columns: one that ``save_to_disk`` wrote, or
one that ``datasets.load_dataset`` understands.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from fedbn.data.population import Population
from fedbn.data.readers import Rows, refuse_missing
from fedbn.errors import UserError, unknown
from fedbn.scenarios.base import Scenario
from fedbn.scenarios.files import population
from fedbn.seeds import numpy_generator


@dataclass(frozen=True)
class Part:
    """One data set of the hub.

    Attributes:
        dataset: its identifier; empty: the hub has none to rely on, so it is read from ``path``.
        x: column of images.
        y: column of class numbers.
        user: column that says whose a row is; empty: see ``domain``.
        domain: name of the one user that the whole data set is; empty: rows are dealt at random.
        subset: configuration, where the data set has several.
    """

    dataset: str
    x: str = "image"
    y: str = "label"
    user: str = ""
    domain: str = ""
    subset: str | None = None


@dataclass(frozen=True)
class Collection:
    """What one name stands for: parts, the shape images are brought to, and the skew between users."""

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
    """Images ``[channels, size, size]`` in -1 to 1 from the Hugging Face hub.

    Attributes:
        data: a name of the table, or an identifier such as ``owner/name``.
        path: a local directory to read instead; for several parts, one sub-directory per domain.
        x: column of images; empty: as the table says.
        y: column of class numbers; empty: as the table says.
        user: column of users; empty: as the table says.
        size: pixels on each side; 0: as the table says.
        users: at most this many users, drawn from all alike in every run.
        limit: at most this many rows a user; none: all.
        test: share of a user's rows that test.
        unseen: users that never train.
    """

    name: ClassVar[str] = "hub"
    about: ClassVar[str] = "image data sets by name: femnist, pacs, cifar10, ... (needs a connection)"
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
        named = {p.classes for p in parts if p.classes}
        if len(named) > 1:
            listed = " / ".join(", ".join(classes) for classes in sorted(named))
            raise UserError(
                f"{self.data}: domains name their classes differently ({listed}); give all the same directories"
            )
        rows = Rows(
            x=np.concatenate([p.x for p in parts]),
            y=np.concatenate([p.y for p in parts]),
            user=np.concatenate([p.user for p in parts]),
            recording=None,
            classes=parts[0].classes,
        )
        refuse_missing(rows.y, f"{self.data}: label")
        labels = rows.y.astype(np.int64 if rows.y.dtype.kind in "biuf" else np.str_)
        digest = hashlib.sha256(rows.x.tobytes() + labels.tobytes()).hexdigest()
        return population(
            rows,
            name=self.data,
            test=self.test,
            gap=0,
            unseen=self.unseen,
            seed=seed,
            skew=collection.skew,
            sources={f"hub/{self.data}": digest},
        )

    def _collection(self) -> Collection:
        if self.size < 0 or self.users < 1 or (self.limit is not None and self.limit < 3):
            raise UserError(
                f"hub: size={self.size}, users={self.users}, limit={self.limit}: choose a size of 0 (the table's) or "
                "more, 1 user or more, and 3 rows a user or more"
            )
        if self.data in COLLECTIONS:
            known = COLLECTIONS[self.data]
        elif "/" in self.data or self.path:
            known = Collection((Part(self.data),), (3, 32, 32), f"whatever skew the users of {self.data} have")
        else:
            raise unknown("data set of scenario 'hub' (or give owner/name)", self.data, COLLECTIONS)
        own = {k: v for k in ("x", "y", "user") if (v := getattr(self, k))}
        shape = (known.shape[0], self.size, self.size) if self.size else known.shape
        return replace(known, parts=tuple(replace(p, **own) for p in known.parts), shape=shape)

    def _rows(self, part: Part, collection: Collection) -> Rows:
        several = len(collection.parts) > 1
        place = Path(self.path, part.domain if several else "")
        if not part.dataset and not (self.path and place.is_dir()):
            raise UserError(
                f"{self.data}: domain {part.domain!r} has no copy on the hub to rely on; unpack its authors' archive "
                f"and give path=DIR, with DIR/{part.domain} holding one directory of images for each class"
            )
        # Of several domains, those that were not brought along are fetched.
        table = _local(place) if self.path and (place.is_dir() or not several) else _online(part)
        for option in ("x", "y", "user"):
            column = getattr(part, option)
            if column and column not in table.column_names:
                raise unknown(f"column of {self.data} (set it with {option}=NAME)", column, table.column_names)
        whose = self._whose(part, table)
        draw = numpy_generator(0, "hub", self.data, part.domain)
        names = draw.permutation(np.unique(whose))[: self.users]
        chosen = np.concatenate([draw.permutation(np.flatnonzero(whose == n))[: self.limit] for n in names])
        picked = table.select(chosen)
        feature = table.features[part.y]
        return Rows(
            x=_pixels(picked, part.x, collection.shape, self.data),
            y=np.asarray(picked[part.y][:]),
            user=whose[chosen],
            recording=None,
            classes=tuple(getattr(feature, "names", None) or ()),
        )

    def _whose(self, part: Part, table: Any) -> np.ndarray:
        if part.user:
            users = np.asarray(table[part.user][:])
            refuse_missing(users, f"{self.data}: user")
            return users.astype(str)
        if part.domain:
            return np.full(len(table), part.domain)
        dealt = numpy_generator(0, "hub", self.data, "deal").permutation(len(table)) % self.users
        return np.array([f"user{i:03d}" for i in dealt])


def _online(part: Part) -> Any:
    """The train split, in the hub's order."""
    from flwr_datasets import FederatedDataset

    try:
        hub = FederatedDataset(dataset=part.dataset, subset=part.subset, partitioners={"train": 1}, shuffle=False)
        return hub.load_split("train")
    except Exception as error:  # connection, authentication, unknown name: as many kinds as libraries below
        reason = (str(error).splitlines() or [""])[0][:200]
        raise UserError(
            f"cannot load {part.dataset!r} from the hub ({type(error).__name__}: {reason}). Check name and connection. "
            f"Without one: where there is one, run datasets.load_dataset({part.dataset!r}, split='train')"
            ".save_to_disk(DIR), bring DIR here and add path=DIR; or use a scenario that needs no download: digits8, "
            "digits, hapt, watch"
        ) from error


def _local(path: Path) -> Any:
    import datasets

    if not path.is_dir():
        raise UserError(f"there is no directory {str(path)!r}; path= names one that save_to_disk wrote")
    try:
        saved = any((path / name).exists() for name in ("state.json", "dataset_dict.json"))
        data = datasets.load_from_disk(str(path)) if saved else datasets.load_dataset(str(path))
    except Exception as error:  # every format has its own kinds
        reason = (str(error).splitlines() or [""])[0]
        raise UserError(f"{path} cannot be read as a data set ({reason}); write it with save_to_disk") from error
    if isinstance(data, datasets.DatasetDict):
        if "train" not in data:
            raise UserError(f"{path} has no split 'train' but {', '.join(data)}; name the split: {path}/SPLIT")
        data = data["train"]
    return data


def _pixels(table: Any, column: str, shape: tuple[int, int, int], name: str) -> np.ndarray:
    """Images as float32 ``[n, *shape]`` in -1 to 1, resized with bilinear interpolation."""
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
        small = image.convert("L" if channels == 1 else "RGB").resize((width, height), Image.Resampling.BILINEAR)
        pixels = np.asarray(small, np.float32).reshape(height, width, channels)
        out[i] = pixels.transpose(2, 0, 1) / 127.5 - 1
    return out

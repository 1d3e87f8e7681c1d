"""Digits: one task, six domains, one client per domain, the setting in which FedBN was proposed.

Li, Jiang, Zhang, Kamp, Dou, *FedBN: Federated Learning on Non-IID Features via Local Batch Normalization*,
ICLR 2021, https://arxiv.org/abs/2102.07623, train one client per data set on 743 images each. Their five data sets need
a download; these six do not:

========== ========================================================= ===========================
domain     content                                                   conversion to 28x28
========== ========================================================= ===========================
mnist      handwriting, US (LeCun et al., 1998)                      none
optdigits  handwriting, Turkey, 8x8 counts (Alpaydin and Kaynak)     20x20 box, bilinear
mfeat      digits on Dutch utility maps, 16x15 (van Breukelen et al.) 20x20 box, bilinear
pendigits  pen movements on a tablet, 8 points (Alpaydin, Alimoglu)  points joined by strokes
fonts      21 printed typefaces bundled with matplotlib              drawn, rotated, shifted
mnistm     MNIST blended with photos (after Ganin, Lempitsky, 2015)  absolute difference
========== ========================================================= ===========================

The skew is a *feature* skew. Part of it is natural (writers and instruments), and part of it comes from the rendering
of the domains that do not have images of that size. ``mnist`` and ``mnistm`` use different halves of the 5,000 packaged
MNIST images, so no digit is a training image in one domain and a test image in another.

Images are independent of each other and some files are sorted by class, so their order does not reflect time. Rows are
in a fixed random order. The file of ``mfeat`` contains six images twice; at the default size none of them is on both
sides of the split.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from fedbn.data.packages import SOURCES, Arrays, cached, fetch
from fedbn.data.population import Examples, Population, User, hold_out
from fedbn.errors import UserError, unknown
from fedbn.scenarios.base import Scenario
from fedbn.seeds import numpy_generator

FACES = (
    *(f"DejaVuSans{s}" for s in ("", "-Bold", "-Oblique", "-BoldOblique")),
    *(f"DejaVuSansMono{s}" for s in ("", "-Bold", "-Oblique", "-BoldOblique")),
    *(f"DejaVuSerif{s}" for s in ("", "-Bold", "-Italic", "-BoldItalic")),
    *(f"STIXGeneral{s}" for s in ("", "Bol", "Italic", "BolIta")),
    *("cmb10", "cmr10", "cmss10", "cmti10", "cmtt10"),
)
FONT_IMAGES = 3000
SIZE, BOX = 28, 20  # pixels
SCALE = 4  # images are drawn this much larger and then downsampled


@dataclass(frozen=True)
class Digits(Scenario):
    """Six clients, images ``[3, 28, 28]`` in [-1, 1], 10 classes.

    A fifth of every domain, stratified by class, is the test data. Of the rest, ``train`` images are used, so that all
    domains have the same weight.

    Attributes:
        unseen: number of domains that never train, or their names joined by ``+``.
        train: number of training images per domain.
        test: maximum number of test images per domain; none for all.
    """

    name: ClassVar[str] = "digits"
    about: ClassVar[str] = "digits in 6 domains, one client each (FedBN's setting)"
    model: ClassVar[str] = "digit-cnn"
    plan: ClassVar[dict[str, object]] = {"rounds": 30, "local_epochs": 1, "batch_size": 32, "lr": 0.01, "momentum": 0.0}

    unseen: str = "1"
    train: int = 743
    test: int | None = None

    def load(self, seed: int) -> Population:
        unseen = self._unseen(seed)
        images = _domains()
        users = tuple(self._user(name, images[f"{name}_x"], images[f"{name}_y"]) for name in DOMAINS)
        return Population(
            users=users,
            unseen=unseen,
            classes=tuple("0123456789"),
            skew="feature skew: six kinds of digits, partly rendered here; labels and quantity balanced",
            sources={f"digits/{name}": _sha256(images[f"{name}_x"]) for name in DOMAINS},
        )

    def _unseen(self, seed: int) -> tuple[int, ...]:
        names = list(DOMAINS)
        if self.unseen.isdigit():
            return hold_out(len(names), int(self.unseen), seed)
        selected = self.unseen.split("+")
        for name in selected:
            if name not in names:
                raise unknown("domain of scenario 'digits'", name, names)
        if len(set(selected)) == len(names):
            raise UserError("unseen lists all six domains, which leaves no user for training; leave one out")
        return tuple(sorted({names.index(name) for name in selected}))

    def _user(self, name: str, images: np.ndarray, labels: np.ndarray) -> User:
        rng = numpy_generator(0, "digits", "split", name)
        order = rng.permutation(len(labels))
        is_test = np.zeros(len(labels), bool)
        for digit in range(10):
            members = order[labels[order] == digit]
            is_test[members[: len(members) // 5]] = True
        train, test = order[~is_test[order]], order[is_test[order]]
        if not 10 <= self.train <= len(train):
            raise UserError(f"train={self.train}: choose 10 to {len(train)}, the size of domain {name!r}")
        if self.test is not None and self.test < 1:
            raise UserError(f"test={self.test}: choose 1 or more, or none for all test images")
        parts = (train[: self.train], test[: self.test])
        return User(name, name, *(_examples(images[p], labels[p], k) for k, p in enumerate(parts)))


def _examples(images: np.ndarray, labels: np.ndarray, recording: int) -> Examples:
    """Convert gray ``[n, 28, 28]`` or color ``[n, 28, 28, 3]`` bytes to ``[n, 3, 28, 28]`` in [-1, 1]."""
    x = torch.from_numpy(images).float().div(255).sub(0.5).div(0.5)
    x = x.permute(0, 3, 1, 2) if x.ndim == 4 else x[:, None].expand(-1, 3, -1, -1)
    y = torch.from_numpy(labels.astype(np.int64))
    return Examples(x.contiguous(), y, torch.full_like(y, recording))


def _domains() -> Arrays:
    """``<domain>_x`` uint8 and ``<domain>_y`` of all six domains, cached."""
    paths = {name: fetch(source) for name, source in SOURCES.items() if source.scenario == "digits"}
    # Other versions of the drawing libraries produce other bytes.
    versions = [f"{p} {version(p)}" for p in ("pillow", "matplotlib", "scikit-learn")]
    identity = "\n".join([*(SOURCES[name].sha256 for name in sorted(paths)), *versions])

    def draw() -> Arrays:
        domains = {name: make(paths) for name, make in DOMAINS.items()}
        return {f"{name}_{k}": a for name, pair in domains.items() for k, a in zip("xy", pair, strict=True)}

    return cached("digits", 1, identity, draw)


Labeled = tuple[np.ndarray, np.ndarray]
Paths = dict[str, Path]


def _mnist(paths: Paths) -> Labeled:
    """Every other image of the file, which is sorted by class, so half of each class."""
    images, labels = _mnist_all(paths)
    return images[::2], labels[::2]


def _mnistm(paths: Paths) -> Labeled:
    """The other half, each image blended with a crop of a photograph."""
    from sklearn.datasets import load_sample_images

    images, labels = (a[1::2] for a in _mnist_all(paths))
    photographs = load_sample_images().images
    rng = numpy_generator(0, "digits", "mnistm")
    out = np.empty((*images.shape, 3), np.uint8)
    for i, image in enumerate(images):
        photograph = photographs[rng.integers(len(photographs))]
        top, left = (rng.integers(n - 2 * SIZE) for n in photograph.shape[:2])
        # A crop of twice the size, downsampled: a 28-pixel crop of these photographs has too few edges.
        crop = photograph[top : top + 2 * SIZE, left : left + 2 * SIZE].astype(np.int16)
        crop = crop.reshape(SIZE, 2, SIZE, 2, 3).mean(axis=(1, 3))
        out[i] = np.abs(crop - image[..., None])
    return out, labels


def _mnist_all(paths: Paths) -> Labeled:
    table = np.loadtxt(paths["mnist"], delimiter=",", dtype=np.uint8)
    return table[:, :-1].reshape(-1, SIZE, SIZE), table[:, -1]


def _optdigits(paths: Paths) -> Labeled:
    table = np.loadtxt(paths["optdigits"], delimiter=",", dtype=np.uint8)
    return _resize(table[:, :-1].reshape(-1, 8, 8), 16), table[:, -1]


def _mfeat(paths: Paths) -> Labeled:
    table = np.loadtxt(paths["mfeat"], delimiter=",", skiprows=1).astype(np.uint8)
    return _resize(table[:, :-1].reshape(-1, 16, 15), 6), table[:, -1]


def _resize(images: np.ndarray, top: int) -> np.ndarray:
    """Fit images with values in [0, ``top``] into a centered box like that of MNIST, at their aspect ratio."""
    height, width = images.shape[1:]
    scale = BOX / max(height, width)
    size = (round(width * scale), round(height * scale))
    out = np.zeros((len(images), SIZE, SIZE), np.uint8)
    y, x = (SIZE - size[1]) // 2, (SIZE - size[0]) // 2
    for canvas, image in zip(out, (images * (255 / top)).astype(np.uint8), strict=True):
        resized = Image.fromarray(image).resize(size, Image.Resampling.BILINEAR)
        canvas[y : y + size[1], x : x + size[0]] = np.asarray(resized)
    return out


def _pendigits(paths: Paths) -> Labeled:
    """Eight points (x, y) in [0, 100], y upwards, joined by a round pen; pen-up positions are unknown."""
    table = np.loadtxt(paths["pendigits"], delimiter=",", dtype=np.int64)
    strokes = table[:, :-1].reshape(-1, 8, 2)
    margin, pen = SCALE * (SIZE - BOX) / 2, 2.5 * SCALE
    out = np.empty((len(table), SIZE, SIZE), np.uint8)
    for i, points in enumerate(strokes):
        xy = [(margin + x * SCALE * BOX / 100, margin + (100 - y) * SCALE * BOX / 100) for x, y in points]
        canvas = Image.new("L", (SIZE * SCALE, SIZE * SCALE))
        brush = ImageDraw.Draw(canvas)
        brush.line(xy, fill=255, width=round(pen), joint="curve")
        for x, y in (xy[0], xy[-1]):
            brush.ellipse((x - pen / 2, y - pen / 2, x + pen / 2, y + pen / 2), fill=255)
        out[i] = np.asarray(canvas.resize((SIZE, SIZE), Image.Resampling.BOX))
    return out, table[:, -1].astype(np.uint8)


def _fonts(paths: Paths) -> Labeled:
    """Every digit in every typeface at random sizes (18 to 24 px), angles (up to 12°) and positions (up to 2 px)."""
    import matplotlib

    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    rng = numpy_generator(0, "digits", "fonts")
    labels = (np.arange(FONT_IMAGES) % 10).astype(np.uint8)
    out = np.empty((FONT_IMAGES, SIZE, SIZE), np.uint8)
    for i, label in enumerate(labels):
        face = folder / f"{FACES[i // 10 % len(FACES)]}.ttf"
        font = ImageFont.truetype(face, round(rng.uniform(18, 24) * SCALE))
        canvas = Image.new("L", (SIZE * SCALE, SIZE * SCALE))
        center = tuple(SCALE * (SIZE / 2 + rng.uniform(-2, 2, 2)))
        # Centered by its bounding box; anchor "mm" would use the height of the typeface.
        left, top, right, bottom = font.getbbox(str(label))
        corner = (center[0] - (left + right) / 2, center[1] - (top + bottom) / 2)
        ImageDraw.Draw(canvas).text(corner, str(label), fill=255, font=font)
        rotated = canvas.rotate(rng.uniform(-12, 12), Image.Resampling.BILINEAR)
        out[i] = np.asarray(rotated.resize((SIZE, SIZE), Image.Resampling.BOX))
    return out, labels


def _sha256(array: np.ndarray) -> str:
    return hashlib.sha256(array.tobytes()).hexdigest()


DOMAINS: dict[str, Callable[[Paths], Labeled]] = {
    "mnist": _mnist,
    "optdigits": _optdigits,
    "mfeat": _mfeat,
    "pendigits": _pendigits,
    "fonts": _fonts,
    "mnistm": _mnistm,
}

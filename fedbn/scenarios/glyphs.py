"""Digits in six domains as gray images of 28x28 pixels, drawn from packaged data sets, and photographs.

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

``mnist`` and ``mnistm`` use different halves of the 5,000 packaged MNIST images, so no digit is a training image in one
domain and a test image in another.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from fedbn.data.packages import SOURCES, Arrays, cached, fetch
from fedbn.errors import UserError
from fedbn.seeds import numpy_generator

# Pillow draws the glyphs. Matplotlib has the same files in all versions since 3.8, except cmti10, which 3.11 added.
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


Labeled = tuple[np.ndarray, np.ndarray]
Paths = dict[str, Path]


@dataclass(frozen=True)
class Domain:
    """Digits of one domain.

    Attributes:
        name: name of the domain.
        glyphs: gray digits on black, ``[n, 28, 28]`` uint8.
        labels: the digits, ``[n]`` uint8.
        images: the digits as they look in the domain: ``glyphs``, or blended with color photographs
            (``[n, 28, 28, 3]`` uint8).
        photographs: color photographs, ``[2, height, width, 3]`` uint8.
    """

    name: str
    glyphs: np.ndarray
    labels: np.ndarray
    images: np.ndarray
    photographs: np.ndarray

    @property
    def has_photographs(self) -> bool:
        """Whether photographs are the background of the domain's digits."""
        return self.images is not self.glyphs


def domains() -> list[Domain]:
    """The six domains, cached."""
    paths = {name: fetch(source) for name, source in SOURCES.items() if source.scenario == "digits"}
    # Other versions of the drawing libraries produce other bytes.
    versions = [f"{p} {version(p)}" for p in ("pillow", "matplotlib", "scikit-learn")]
    identity = "\n".join([*(SOURCES[name].sha256 for name in sorted(paths)), *versions])
    drawn = cached("digits", 2, identity, lambda: _draw(paths))
    found = []
    for name in DOMAINS:
        glyphs = drawn[f"{name}_glyphs"]
        images = drawn.get(f"{name}_images", glyphs)
        found.append(Domain(name, glyphs, drawn[f"{name}_labels"], images, drawn["photographs"]))
    return found


def _draw(paths: Paths) -> Arrays:
    from sklearn.datasets import load_sample_images

    drawn = {"photographs": np.stack(load_sample_images().images)}
    for name, make in DOMAINS.items():
        drawn[f"{name}_glyphs"], drawn[f"{name}_labels"] = make(paths)
    rng = numpy_generator(0, "digits", "mnistm")
    glyphs = drawn["mnistm_glyphs"]
    return drawn | {"mnistm_images": blend(glyphs[..., None], crops(drawn["photographs"], len(glyphs), rng))}


def crops(photographs: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """Random pieces ``[count, 28, 28, 3]`` of photographs ``[n, height, width, 3]``, as real numbers in [0, 255].

    A piece has twice the size and is downsampled: 28 pixels of these photographs have too few edges.
    """
    out = np.empty((count, SIZE, SIZE, 3))
    for i in range(count):
        photograph = photographs[rng.integers(len(photographs))]
        top, left = (rng.integers(n - 2 * SIZE) for n in photograph.shape[:2])
        crop = photograph[top : top + 2 * SIZE, left : left + 2 * SIZE].astype(np.int16)
        out[i] = crop.reshape(SIZE, 2, SIZE, 2, 3).mean(axis=(1, 3))
    return out


def blend(glyphs: np.ndarray, background: np.ndarray) -> np.ndarray:
    """Absolute difference of digits and a background, as bytes."""
    return np.abs(background - glyphs).astype(np.uint8)


def _mnist(paths: Paths) -> Labeled:
    """Every other image of the file, which is sorted by class, so half of each class."""
    images, labels = _mnist_all(paths)
    return images[::2], labels[::2]


def _mnistm(paths: Paths) -> Labeled:
    """The other half."""
    images, labels = _mnist_all(paths)
    return images[1::2], labels[1::2]


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
    if missing := [face for face in FACES if not (folder / f"{face}.ttf").is_file()]:
        raise UserError(f"scenario digits draws the typeface {missing[0]}: pip install 'matplotlib>=3.11'")
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


DOMAINS: dict[str, Callable[[Paths], Labeled]] = {
    "mnist": _mnist,
    "optdigits": _optdigits,
    "mfeat": _mfeat,
    "pendigits": _pendigits,
    "fonts": _fonts,
    "mnistm": _mnistm,
}

"""Targets of the scenarios with digits: masks, sets and angles."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fedbn.scenarios.digit_angles import DigitAngles, turn
from fedbn.scenarios.digit_domains import backgrounds, split
from fedbn.scenarios.digit_masks import SCANNERS, DigitMasks, Scanner
from fedbn.scenarios.digit_sets import DigitSets, compose
from fedbn.scenarios.glyphs import DOMAINS, Domain
from fedbn.seeds import numpy_generator

COUNT = 60
WIDTH = 240
ROWS = np.arange(5, COUNT, 2)


def domain(glyphs, photographs=0, name="mnist"):
    """A domain whose digit i has the label i % 10."""
    photographs = np.broadcast_to(np.asarray(photographs, np.uint8)[..., None], (2, 70, WIDTH, 3))
    return Domain(name, glyphs, (np.arange(len(glyphs)) % 10).astype(np.uint8), glyphs, photographs)


def numbered():
    """Digits without shape: all pixels of digit i have the value i + 1."""
    return np.broadcast_to(np.arange(1, COUNT + 1, dtype=np.uint8)[:, None, None], (COUNT, 28, 28))


def bars():
    """Upright bars of different lengths."""
    images = np.zeros((COUNT, 28, 28), np.uint8)
    for i, image in enumerate(images):
        image[4 + i % 4 : 24 - i % 4, 12:16] = 255
    return images


def orientation(images):
    """Degrees by which bars ``[n, 28, 28]`` lean counterclockwise, from their second moments."""
    weight = images / images.sum((1, 2), keepdims=True)
    y, x = np.mgrid[:28, :28] - 13.5
    xx, yy, xy = ((weight * value).sum((1, 2)) for value in (x * x, y * y, x * y))
    return np.degrees(np.arctan2(2 * xy, yy - xx) / 2)


def test_first_rows_of_both_parts_are_random_samples():
    labels = (np.arange(10_000) % 10).astype(np.uint8)
    images = np.arange(len(labels), dtype=np.uint16).view(np.uint8).reshape(-1, 1, 2)
    for part, total in zip(split(Domain("mnist", images, labels, images, images)), (8000, 2000), strict=True):
        counts = np.bincount(labels[part[:200]], minlength=10)
        assert len(part) == total
        assert ((counts - 20) ** 2 / 20).sum() < 21.7, "the chi-squared statistic, with 9 degrees of freedom, p = .01"


# --- digit-masks


def test_mask_is_pixels_of_digit():
    glyphs = numpy_generator(0, "glyphs").integers(0, 256, (COUNT, 28, 28)).astype(np.uint8)
    x, y = DigitMasks().examples(domain(glyphs), ROWS, "train")
    assert (x.shape, x.dtype) == ((len(ROWS), 1, 28, 28), torch.float32)
    assert torch.equal(y, torch.from_numpy(glyphs[ROWS] > 127).long())


@pytest.mark.parametrize("name", DOMAINS)
def test_digit_is_brighter_than_background_in_every_scanner(name):
    glyphs = bars()
    x, y = DigitMasks().examples(domain(glyphs, 50, name), ROWS, "train")
    scanner = SCANNERS[name]
    inside, outside = x[:, 0][y == 1].mean(), x[:, 0][:, :, :4].mean()
    assert float(inside - outside) > 0.25 * scanner.contrast
    assert float(outside) == pytest.approx(scanner.contrast * 0.6 * 50 / 255 + scanner.brightness, abs=0.02)


def test_scanner_applies_contrast_brightness_blur_and_noise():
    rng = numpy_generator(0, "scanner")
    images = rng.random((20, 28, 28))
    exact = Scanner(contrast=2, brightness=0.5, blur=0, noise=0).record(images, rng)
    np.testing.assert_allclose(exact, 2 * images + 0.5, rtol=1e-6)
    noisy = Scanner(contrast=2, brightness=0.5, blur=0, noise=0.1).record(images, rng) - exact
    assert (float(noisy.mean()), float(noisy.std())) == pytest.approx((0, 0.2), abs=0.01)
    blurred = Scanner(contrast=1, brightness=0, blur=1, noise=0).record(images, rng)
    assert blurred.std(axis=(1, 2)).max() < 0.5 * images.std(axis=(1, 2)).min()
    # The blur does not mix images.
    np.testing.assert_allclose(blurred.mean(axis=(1, 2)), images.mean(axis=(1, 2)), atol=0.02)


def test_test_backgrounds_are_from_another_part_of_photographs():
    columns = domain(bars(), np.arange(WIDTH) % 256)
    edge = 3 * WIDTH // 4
    for part, low, high in (("train", 0, edge), ("test", edge, WIDTH)):
        found = backgrounds(columns, 200, part, numpy_generator(0, part))
        assert found.shape == (200, 28, 28)
        assert low <= found.min() < low + 6
        assert high - 8 < found.max() < high


# --- digit-sets


def test_set_has_digits_that_appear():
    x, y = DigitSets().examples(domain(numbered()), ROWS, "train")
    cells = ((x[:, 0] + 1) * 127.5).round().long().unflatten(1, (2, 14)).unflatten(3, (2, 14)).transpose(2, 3)
    assert (cells.amax((3, 4)) == cells.amin((3, 4))).all()
    values = cells.amax((3, 4)).flatten(1)
    for shown, target in zip(values.tolist(), y, strict=True):
        digits = [v - 1 for v in shown if v]
        assert 1 <= len(digits) <= 4
        assert set(digits) <= set(ROWS.tolist())
        assert set(target.nonzero()[:, 0].tolist()) == {d % 10 for d in digits}
    counts = (values > 0).sum(1).bincount(minlength=5)
    assert (counts[1:] > 0).all()
    assert ((values > 0).sum(0) > 0).all()


def test_compose_halves_digits():
    glyphs = numpy_generator(0, "glyphs").integers(0, 256, (1, 4, 28, 28))
    (image,) = compose(glyphs, np.array([[True, False, True, True]]))
    assert not image[:14, 14:].any()
    for cell, corner in ((0, (0, 0)), (2, (14, 0)), (3, (14, 14))):
        expected = sum(glyphs[0, cell, i::2, j::2] for i in (0, 1) for j in (0, 1)) // 4
        assert (image[corner[0] : corner[0] + 14, corner[1] : corner[1] + 14] == expected).all()


# --- digit-angles


def test_angle_is_that_of_image():
    x, y = DigitAngles().examples(domain(bars()), ROWS, "train")
    images = (x[:, 0].double().numpy() + 1) / 2
    np.testing.assert_allclose(orientation(images), y, atol=1.5)
    assert y.dtype == torch.float32
    assert -60 <= float(y.min()) < -40
    assert 40 < float(y.max()) <= 60


def test_angles_have_limit():
    _, y = DigitAngles(limit=5).examples(domain(bars()), ROWS, "train")
    assert 4 < float(y.abs().max()) <= 5


def test_turn_is_exact_for_right_angles_and_can_be_undone():
    image = bars()[0]
    assert (turn(image, 90) == np.rot90(image)).all()
    assert np.abs(turn(turn(image, 30), -30).astype(int) - image).mean() < 6


@pytest.mark.parametrize("scenario", [DigitMasks(), DigitSets(), DigitAngles()])
def test_parts_are_drawn_independently(scenario):
    train, test = (scenario.examples(domain(bars()), ROWS, part) for part in ("train", "test"))
    assert not torch.equal(train[0], test[0])
    again = scenario.examples(domain(bars()), ROWS, "train")
    assert all(map(torch.equal, train, again))


@pytest.mark.parametrize("scenario", [DigitSets(), DigitAngles()])
def test_digits_lie_over_photographs_in_domain_with_photographs(scenario):
    plain = domain(bars())
    over = Domain("mnist", plain.glyphs, plain.labels, plain.images[..., None], np.full((2, 70, 400, 3), 200, np.uint8))
    (dark, y), (bright, same) = (scenario.examples(d, ROWS, "train") for d in (plain, over))
    assert torch.equal(y, same)
    pixels = [((x + 1) * 127.5).round() for x in (dark, bright)]
    assert torch.equal(pixels[1], (200 - pixels[0]).abs())

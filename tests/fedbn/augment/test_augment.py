"""Augmentation: keyed draws, kinds of callables, and errors."""

from __future__ import annotations

import random
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from fedbn.augment.base import augmentation, augmentation_text, augmentations, check_augmentation
from fedbn.augment.images import Flip
from fedbn.errors import UserError
from fedbn.federation.loop import federate
from fedbn.federation.run import plan_for
from fedbn.federation.setup import build_context
from fedbn.seeds import generator

HERE = f"{__name__}:"


def doubled(x, generator):
    return 2 * x


def both(x, y, generator):
    return x.flip(-1), (y + 1) % 3


def one_example(x):
    return x + torch.rand(1) + random.random() + np.random.rand()


class Transform(nn.Module):
    """A transform in the style of torchvision's second version."""

    def forward(self, *inputs):
        return inputs[0] * torch.rand(1)


transform = Transform()


def halves(x, generator):
    return x.half()


def cropped(x):
    return x[..., 1:]


def only_x(x, y, generator):
    return x


def as_list(x, generator):
    return x.tolist()


def raising(x, generator):
    raise IndexError("too far")


def four(a, b, c, d):
    return a


def batch(shape=(3, 1, 4, 4)):
    return torch.rand(shape, generator=torch.Generator().manual_seed(1)), torch.tensor([0, 1, 2])[: shape[0]]


def draw(step=0):
    return generator(0, "augment", 1, 2, step)


@pytest.mark.parametrize("name", augmentations())
def test_builtin_draws_depend_on_the_generator_only(name):
    x, y = batch((3, 3, 8) if name in ("jitter", "rotate") else (3, 1, 8, 8))
    start = x.clone()
    torch.manual_seed(0)
    state = torch.get_rng_state()
    chosen = augmentation(name)
    first, again, other = (chosen(x.clone(), y, draw(step))[0] for step in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert first.shape == x.shape
    assert not torch.equal(first, start)


def test_flip_moves_masks_with_images():
    x, _ = batch()
    masks = (x[:, 0] > 0.5).long()
    images, moved = Flip()(x, masks, draw())
    assert torch.equal((images[:, 0] > 0.5).long(), moved)
    changed = [not torch.equal(a, b) for a, b in zip(images, x, strict=True)]
    assert any(changed)
    assert not all(changed)


def test_callables_take_an_example_a_batch_or_a_batch_with_targets():
    x, y = batch()
    assert torch.equal(augmentation(HERE + "doubled")(x, y, draw())[0], 2 * x)
    out, targets = augmentation(HERE + "both")(x, y, draw())
    assert torch.equal(out, x.flip(-1))
    assert torch.equal(targets, (y + 1) % 3)
    chained, _ = augmentation(f"{HERE}doubled+flip:p=1")(x, y, draw())
    assert torch.equal(chained, 2 * x.flip(-1))
    assert augmentation("") is None


@pytest.mark.parametrize("name", ["one_example", "transform"])
def test_global_generators_are_seeded_and_restored(name):
    x, y = batch()
    torch.manual_seed(0), random.seed(0), np.random.seed(0)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    first, again, other = (augmentation(HERE + name)(x, y, draw(step))[0] for step in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not torch.equal(first[0] - x[0], first[1] - x[1])
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before[1:]


def test_objects_become_texts():
    assert plan_for("digits8", augment=doubled).augment == HERE + "doubled"
    assert plan_for("digits8", augment=Flip(p=0.1)).augment == "flip:p=0.1"
    assert augmentation_text(augmentation(f"flip + {HERE}both")) == f"flip+{HERE}both"
    assert augmentation_text(Flip) == "flip"


def test_callables_of_a_notebook_are_named_by_their_content():
    for value in (lambda x, generator: x + 1, Transform(), partial(one_example)):
        text = augmentation_text(value)
        assert text.startswith("memory:")
        assert augmentation_text(f"flip + {text}") == f"flip+{text}"
        assert augmentation(text)(*batch(), draw())[0].shape == batch()[0].shape


def test_augmentation_changes_training_only(small):
    plain, flipped = (federate(small("global-naive", augment=text, rounds=1)) for text in ("", "translate"))
    assert plain.curve[0].train_loss != flipped.curve[0].train_loss
    still = federate(small("global-naive", augment="flip:p=0", rounds=1))
    assert still.curve == plain.curve
    assert still.scores == plain.scores


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("flop", "unknown augmentation .*Did you mean 'flip'"),
        ("flip:p=2", "p must be from 0 to 1"),
        ("translate:pixels=0", "pixels must be at least 1"),
        ("rotate", r"works on 3-axis sensors.*not examples of shape \[1, 8, 8\]"),
        (HERE + "halves", r"turned \[4, 1, 8, 8\] float32 into \[4, 1, 8, 8\] float16"),
        (HERE + "cropped", r"turned \[1, 8, 8\] float32 into \[1, 8, 7\] float32"),
        (HERE + "only_x", r"must return \(x, y\)"),
        (HERE + "as_list", "returned a list: it must return a tensor"),
        (HERE + "raising", r"fails on a batch of shape \[4, 1, 8, 8\]: IndexError: too far"),
        (HERE + "four", "must take"),
        (HERE + "nothing", "unknown augmentation in"),
    ],
)
def test_bad_augmentations_are_refused_before_training(text, message, small):
    with pytest.raises(UserError, match=message) as caught:
        build_context(small("fedbn", augment=text))
    assert "\n" not in str(caught.value)


def test_images_are_required_by_flip():
    with pytest.raises(UserError, match="works on images"):
        check_augmentation("flip", *batch((3, 3, 8)))

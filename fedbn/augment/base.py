"""Augmentation of training batches: built-in plug-ins, and callables of the user.

``flip+jitter:scale=0.1`` applies one after the other. ``package.module:name`` names a callable. Its arguments say what
it takes: ``(x)`` one example, as transforms of torchvision do; ``(x, generator)`` a batch of inputs; and
``(x, y, generator)`` a batch with its targets, of which it returns both.
"""

from __future__ import annotations

import inspect
import random
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from fedbn.errors import UserError
from fedbn.plugins import callable_of, callable_text, discover, parse, render
from fedbn.seeds import seed_torch

Batch = tuple[Tensor, Tensor]
"""Inputs ``[B, *shape]`` and targets ``[B, ...]``."""


@dataclass(frozen=True)
class Augmentation:
    """Base class of augmentations. The fields of a subclass are its options.

    Attributes:
        name: name on the command line.
        about: one-line description.
        draws_globally: whether it can draw from the global generators, so that it cannot run in parallel to training.
    """

    name: ClassVar[str]
    about: ClassVar[str]
    draws_globally: ClassVar[bool] = False

    def __call__(self, x: Tensor, y: Tensor, generator: torch.Generator) -> Batch:
        """Augment a batch.

        Args:
            x: inputs ``[B, *shape]``; may change in place.
            y: targets ``[B, ...]``; may change in place.
            generator: generator on the CPU, keyed by seed, round, user and step.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class Chain(Augmentation):
    """Several augmentations, one after the other.

    Attributes:
        steps: the augmentations.
    """

    steps: tuple[Augmentation, ...]

    @property
    def draws_globally(self) -> bool:  # type: ignore[override]
        """Whether one of the steps can."""
        return any(step.draws_globally for step in self.steps)

    def __call__(self, x: Tensor, y: Tensor, generator: torch.Generator) -> Batch:
        for step in self.steps:
            x, y = step(x, y, generator)
        return x, y


@dataclass(frozen=True)
class CallableAugmentation(Augmentation):
    """A callable of the user. The global generators of torch, NumPy and Python are seeded for each batch.

    Attributes:
        text: its name, for messages.
        function: the callable.

    Raises:
        UserError: it takes other arguments than ``(x)``, ``(x, generator)`` or ``(x, y, generator)``; or, when called,
            it changes the type or the shape of a batch.

    >>> double = CallableAugmentation("double", lambda x, generator: 2 * x)
    >>> double(torch.ones(2), torch.zeros(2), torch.Generator())[0]
    tensor([2., 2.])
    """

    text: str
    function: Callable[..., Any]
    draws_globally: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self._number_of_arguments() not in (1, 2, 3):
            raise UserError(
                f"augmentation {self.text!r} must take (x) for one example, (x, generator) for a batch, or "
                "(x, y, generator) for a batch with targets"
            )

    def _number_of_arguments(self) -> int:
        try:
            parameters = inspect.signature(self.function).parameters.values()
        except (TypeError, ValueError):
            return 1
        positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        # A variable number of arguments, as in transforms of torchvision's second version, means one example.
        return sum(p.kind in positional and p.default is p.empty for p in parameters) or 1

    def __call__(self, x: Tensor, y: Tensor, generator: torch.Generator) -> Batch:
        count = self._number_of_arguments()
        with _seeded(int(torch.randint(2**32, (), generator=generator))):
            if count == 1:
                out, targets = torch.stack([self._tensor(self.function(example), x[0]) for example in x]), y
            elif count == 2:
                out, targets = self._tensor(self.function(x, generator), x), y
            else:
                both = self.function(x, y, generator)
                if not isinstance(both, tuple | list) or len(both) != 2:
                    raise UserError(f"augmentation {self.text!r} takes (x, y, generator), so it must return (x, y)")
                out, targets = self._tensor(both[0], x), self._tensor(both[1], y)
        return out, targets

    def _tensor(self, value: Any, original: Tensor) -> Tensor:
        if not isinstance(value, Tensor):
            raise UserError(f"augmentation {self.text!r} returned a {type(value).__name__}: it must return a tensor")
        if (value.shape, value.dtype) != (original.shape, original.dtype):
            old, new = (f"{list(t.shape)} {str(t.dtype).removeprefix('torch.')}" for t in (original, value))
            raise UserError(
                f"augmentation {self.text!r} turned {old} into {new}: it must return the same shape and type"
            )
        return value


_LOCK = threading.Lock()


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Context in which the global generators are seeded; their states are restored afterwards."""
    with _LOCK, torch.random.fork_rng(devices=[]):
        states = random.getstate(), np.random.get_state()
        seed_torch(seed)
        random.seed(seed)
        np.random.seed(seed)
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])


def augmentations() -> dict[str, type[Augmentation]]:
    """All built-in augmentations, by name."""
    return discover("fedbn.augment", Augmentation)


def augmentation(text: str) -> Augmentation | None:
    """Parse augmentations such as ``flip+jitter:scale=0.1`` or ``package.module:callable``; None for none.

    Raises:
        UserError: unknown augmentation or option, or a callable that cannot be imported or takes other arguments.

    >>> augmentation("jitter:scale=0.1")
    Jitter(scale=0.1)
    """
    steps = _steps(text)
    return steps[0] if len(steps) == 1 else Chain(tuple(steps)) if steps else None


def augmentation_text(value: str | Augmentation | Callable[..., Any]) -> str:
    """The shortest text of augmentations, after a check of their names and options.

    Args:
        value: a text, a plug-in or its class, or a callable as in `CallableAugmentation`.

    Raises:
        UserError: as `augmentation`, or another object.

    >>> augmentation_text("flip + jitter:scale=0.1")
    'flip+jitter:scale=0.1'
    """
    if isinstance(value, Chain):
        return "+".join(map(augmentation_text, value.steps))
    if isinstance(value, CallableAugmentation):
        return value.text
    text = callable_text(value, "augmentation", augmentations(), Augmentation)
    return "+".join(s.text if isinstance(s, CallableAugmentation) else render(s) for s in _steps(text))


def _steps(text: str) -> Sequence[Augmentation]:
    return [_step(part.strip()) for part in text.split("+") if part.strip()]


def _step(text: str) -> Augmentation:
    if (function := callable_of(text, "augmentation", augmentations(), Augmentation)) is not None:
        return CallableAugmentation(text, function)
    return parse(text, "augmentation (or package.module:callable)", augmentations(), Augmentation)


def check_augmentation(text: str, x: Tensor, y: Tensor) -> None:
    """Check that augmentations apply to a batch.

    Raises:
        UserError: they do not, or change the type or the shape of the batch.
    """
    chosen = augmentation(text)
    if chosen is None:
        return
    try:
        chosen(x.clone(), y.clone(), torch.Generator().manual_seed(0))
    except UserError:
        raise
    except Exception as error:  # a user's callable may raise anything
        raise UserError(
            f"augmentation {text!r} fails on a batch of shape {list(x.shape)}: {type(error).__name__}: {error}"
        ) from error

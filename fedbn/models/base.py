"""Base class and factories of the built-in networks, which are discovered automatically."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import ClassVar, Protocol

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from fedbn.config import parts
from fedbn.errors import UserError, unknown
from fedbn.models.inspection import example_batch, inspect_model
from fedbn.nn.plain import plain
from fedbn.nn.roles import set_head
from fedbn.objects import in_memory, reference, resolve
from fedbn.plugins import discover
from fedbn.seeds import seeded


class Network(nn.Module):
    """Base of the built-in models, which are built from the shape of an example and the number of classes.

    Attributes:
        name: name on the command line.
        about: one-line description.
    """

    name: ClassVar[str]
    about: ClassVar[str]

    def __init__(self, shape: tuple[int, ...], classes: int) -> None:
        super().__init__()

    def require_shape(self, fits: bool, expected: str, shape: tuple[int, ...]) -> None:
        """Raise unless the shape of an example fits."""
        if not fits:
            raise UserError(f"{self.name} takes {expected}, not examples of shape {list(shape)}")


class Factory(Protocol):
    """A callable that builds a model for examples of a shape and a number of classes."""

    def __call__(self, shape: tuple[int, ...], classes: int) -> nn.Module: ...


def models() -> dict[str, type[Network]]:
    """All built-in models, by name."""
    return discover("fedbn.models", Network)


def factory(text: str) -> Factory:
    """Factory of the built-in model named ``text``, or of a user's model ``package.module:factory``.

    A user's factory may accept the arguments ``shape`` and ``classes``, by these names. A model in memory
    (`model_text`) is copied.

    Raises:
        UserError: unknown name, the module cannot be imported, or the object is not a factory or needs other arguments.
    """
    if ":" not in text:
        known = models()
        if text not in known:
            raise unknown("model (or package.module:factory)", text, known)
        return known[text]
    user_factory = _factory(text)
    try:
        accepted = inspect.signature(user_factory).parameters
    except (TypeError, ValueError) as error:
        raise UserError(f"model {text!r}: {error}; name a function or class that returns a model") from None
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    required = [n for n, p in accepted.items() if p.default is p.empty and p.kind not in variadic]
    if others := [n for n in required if n not in ("shape", "classes")]:
        raise UserError(
            f"model {text!r} needs {', '.join(others)}: give defaults, or wrap it in a function without these arguments"
        )

    def build(shape: tuple[int, ...], classes: int) -> nn.Module:
        if not shape and "shape" in required:
            raise UserError(f"model {text!r} needs the shape of an example: give it, e.g. --shape 3,32,32")
        arguments = {"shape": shape, "classes": classes}
        model = user_factory(**{k: v for k, v in arguments.items() if k in accepted})
        if not isinstance(model, nn.Module):
            raise UserError(f"model {text!r} returned a {type(model).__name__}, not a torch.nn.Module")
        return model

    return build


def model_text(model: str | nn.Module | Callable[..., nn.Module]) -> str:
    """The text that `factory` converts to a model that is given as an object.

    Args:
        model: a text, a factory or class, or a network, which starts every run with its current weights.

    Raises:
        UserError: another object, or a network that cannot be copied.

    >>> model_text(models()["mlp"])
    'mlp'
    """
    if isinstance(model, str):
        return model
    if isinstance(model, nn.Module):
        try:
            return reference(copy.deepcopy(model))
        except UserError:
            raise
        except Exception as error:
            raise UserError(
                f"model {type(model).__name__} cannot be copied ({error}): pass a function that returns a new one"
            ) from error
    if not callable(model):
        raise UserError(f"model must be a text, a factory or a torch.nn.Module, not {model!r}")
    if inspect.isclass(model) and not issubclass(model, nn.Module):
        raise UserError(f"model {model.__name__} is not a subclass of torch.nn.Module")
    name = getattr(model, "name", None)
    return str(name) if models().get(str(name)) is model else reference(model)


def _factory(text: str) -> Callable[..., nn.Module]:
    """The factory with a reference. A network in memory is copied."""
    found = resolve(text, "model")
    if isinstance(found, nn.Module):
        if not in_memory(text):
            raise UserError(f"model {text!r} is a model, not a factory: name a function that returns a new one")
        return lambda: copy.deepcopy(found)
    if not callable(found):
        raise UserError(
            f"model {text!r}: {type(found).__name__} is not callable; name a function or class that returns a model, "
            "as package.module:factory"
        )
    return found  # type: ignore[no-any-return]


def build(text: str, shape: tuple[int, ...], classes: int, seed: int, head: str = "") -> nn.Module:
    """Build a model whose weights depend only on ``seed``; torch's global generator does not change.

    Wrappers are removed, lazy layers are initialized, and a model with several outputs returns its logits.

    Args:
        text: as in `factory`.
        shape: shape of an example; may be empty for a factory that does not take it.
        classes: number of classes.
        seed: seed of the initial weights.
        head: paths of the layers that form the head, comma-separated; empty: the last layer before the logits.

    Raises:
        UserError: as in `factory`; the factory fails; lazy layers cannot be initialized; the model is scripted, cannot
            be copied, or returns no logits; or ``head`` matches nothing.

    >>> from fedbn.nn.roles import head
    >>> head(build("mlp", (4,), 3, 0)), head(build("mlp", (4,), 3, 0, head="hidden"))
    (('classifier',), ('hidden',))
    """
    make = factory(text)
    if not shape and ":" not in text:
        raise UserError(f"model {text!r} needs the shape of an example: give it, e.g. --shape 3,32,32")
    with seeded(seed, "initial weights"):
        try:
            model = make(shape=shape, classes=classes)
        except UserError:
            raise
        except Exception as error:
            raise UserError(
                f"model {text!r} could not be built for shape {list(shape)} and {classes} classes: "
                f"{type(error).__name__}: {error}. Check the shape, or call the factory in Python to see where"
            ) from error
        try:
            model = plain(model)
            _initialize_lazy_layers(model, shape)
            if shape:
                return inspect_model(model, shape, classes, parts(head))
            if head:
                set_head(model, parts(head))
        except UserError as error:
            raise UserError(f"model {text!r}: {error}") from error
    return model


def _initialize_lazy_layers(model: nn.Module, shape: tuple[int, ...]) -> None:
    """Initialize the lazy layers of a model with one evaluation-mode pass, if it has any."""
    if not (lazy := [k for k, v in model.state_dict(keep_vars=True).items() if is_lazy(v)]):
        return
    reason = "give the shape of an example, e.g. --shape 3,32,32"
    modes = {module: module.training for module in model.modules()}
    if shape:
        try:
            with torch.no_grad():
                model.eval()(example_batch(model, shape))
        except Exception as error:  # a user's forward may raise anything
            reason = f"a batch of shape {[2, *shape]} raises {type(error).__name__}: {error}"
    for module, mode in modes.items():
        module.training = mode
    if any(is_lazy(v) for v in model.state_dict(keep_vars=True).values()):
        raise UserError(
            f"it has uninitialized lazy layers ({lazy[0]}, ...): {reason}, or let the factory "
            "run one batch through the model before returning it"
        )

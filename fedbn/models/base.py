"""Networks to compare treatments on. One file each; a new one is found by being here."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from typing import ClassVar, Protocol

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from fedbn.errors import UserError, unknown
from fedbn.plugins import discover
from fedbn.seeds import key


class Network(nn.Module):
    """Base of the built-in models: built from the shape of an example and the number of classes.

    Attributes:
        name: what the command line calls it.
        about: one line for lists.
    """

    name: ClassVar[str]
    about: ClassVar[str]

    def __init__(self, shape: tuple[int, ...], classes: int) -> None:
        super().__init__()


class Factory(Protocol):
    """Anything that makes a model for examples of a shape and a number of classes."""

    def __call__(self, shape: tuple[int, ...], classes: int) -> nn.Module: ...


def models() -> dict[str, type[Network]]:
    """All built-in models, by name."""
    return discover("fedbn.models", Network)


def factory(text: str) -> Factory:
    """The model named ``text``, or the user's own as ``package.module:factory``.

    A factory of the user's may take ``shape`` and ``classes`` (by these names), or nothing.

    Raises:
        UserError: unknown name, module that cannot be imported, something that is no factory or needs more.
    """
    if ":" not in text:
        known = models()
        if text not in known:
            raise unknown("model (or package.module:factory)", text, known)
        return known[text]
    made = _imported(text)
    try:
        accepted = inspect.signature(made).parameters
    except (TypeError, ValueError) as error:
        raise UserError(f"model {text!r}: {error}; name a function or class that returns a model") from None
    starred = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    needed = [n for n, p in accepted.items() if p.default is p.empty and p.kind not in starred]
    if more := [n for n in needed if n not in ("shape", "classes")]:
        raise UserError(f"model {text!r} needs {', '.join(more)}: give defaults, or wrap it in a function without")

    def build(shape: tuple[int, ...], classes: int) -> nn.Module:
        if not shape and "shape" in needed:
            raise UserError(f"model {text!r} needs the shape of an example: give it, e.g. --shape 3,32,32")
        offered = {"shape": shape, "classes": classes}
        model = made(**{k: v for k, v in offered.items() if k in accepted})
        if not isinstance(model, nn.Module):
            raise UserError(f"model {text!r} gave a {type(model).__name__}, not a torch.nn.Module")
        return model

    return build


def _imported(text: str) -> Callable[..., nn.Module]:
    module_name, _, attribute = text.partition(":")
    wanted = "name a function or class that returns a model, as package.module:factory"
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise UserError(
            f"model {text!r}: cannot import {module_name!r} ({error}); run where it can be imported"
        ) from None
    except Exception as error:
        raise UserError(f"model {text!r}: {type(error).__name__}: {error}; {wanted}") from error
    if not hasattr(module, attribute):
        raise unknown(f"factory in {module_name}", attribute, [n for n, v in vars(module).items() if callable(v)])
    made = getattr(module, attribute)
    if isinstance(made, nn.Module):
        raise UserError(f"model {text!r} is a model, not a factory: name a function that returns a new one")
    if not callable(made):
        raise UserError(f"model {text!r}: {type(made).__name__} is not callable; {wanted}")
    return made


def build(text: str, shape: tuple[int, ...], classes: int, seed: int) -> nn.Module:
    """Build a model with weights determined by ``seed`` alone; torch's global generator is left as it was.

    Raises:
        UserError: as `factory`, or whatever the factory raises, or layers whose shape is still open.
    """
    make = factory(text)
    if not shape and ":" not in text:
        raise UserError(f"model {text!r} needs the shape of an example: give it, e.g. --shape 3,32,32")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(key(seed, "initial weights"))
        try:
            model = make(shape=shape, classes=classes)
        except UserError:
            raise
        except Exception as error:
            raise UserError(
                f"model {text!r} could not be built for shape {list(shape)} and {classes} classes: "
                f"{type(error).__name__}: {error}. Check the shape, or call the factory in Python to see where"
            ) from error
    if lazy := [k for k, v in model.state_dict(keep_vars=True).items() if is_lazy(v)]:
        raise UserError(
            f"model {text!r} has lazy layers without a shape yet ({lazy[0]}, ...): let the factory run one "
            "batch through the model before returning it"
        )
    return model

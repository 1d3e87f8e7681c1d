"""Networks to compare treatments on. One file each; a new one is found by being here."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from typing import ClassVar, Protocol

import torch
from torch import nn

from fedbn.errors import UserError, unknown
from fedbn.seeds import key
from fedbn.spec import discover


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
        UserError: unknown name, module that cannot be imported, something that is no factory.
    """
    if ":" not in text:
        known = models()
        if text not in known:
            raise unknown("model (or package.module:factory)", text, known)
        return known[text]
    module_name, _, attribute = text.partition(":")
    try:
        made: Callable[..., nn.Module] = getattr(importlib.import_module(module_name), attribute)
    except ImportError as error:
        raise UserError(f"model {text!r}: cannot import {module_name!r} ({error}); run where it can be imported") from None
    except AttributeError:
        known = [n for n, v in vars(importlib.import_module(module_name)).items() if callable(v)]
        raise unknown(f"factory in {module_name}", attribute, known) from None
    accepted = inspect.signature(made).parameters

    def build(shape: tuple[int, ...], classes: int) -> nn.Module:
        offered = {"shape": shape, "classes": classes}
        model = made(**{k: v for k, v in offered.items() if k in accepted})
        if not isinstance(model, nn.Module):
            raise UserError(f"model {text!r} gave a {type(model).__name__}, not a torch.nn.Module")
        return model

    return build


def build(text: str, shape: tuple[int, ...], classes: int, seed: int) -> nn.Module:
    """Build a model with weights determined by ``seed`` alone; torch's global generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(key(seed, "initial weights"))
        return factory(text)(shape=shape, classes=classes)

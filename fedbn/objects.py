"""Texts that name Python objects, so that runs, results and Flower's run config can carry them.

A class or function that a module defines is ``module:qualname``, and every process can import it. Everything else (a
class of a notebook, a lambda, a model, data) is ``memory:NAME-DIGEST``, where the digest is that of its content: the
same object has the same text in every process, and is found in the processes that were given it.
"""

from __future__ import annotations

import importlib
import inspect
import operator
import pickle
import re
import sys
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fedbn.digests import Definition, digest, importable_name
from fedbn.errors import UserError, unknown

MEMORY = "memory"
_IN_MEMORY = re.compile(MEMORY + r":\w+-[0-9a-f]{12}\b")

_objects: dict[str, Any] = {}
_references: dict[int, tuple[str, Any]] = {}
"""Reference by ``id``, and the object if it is a class or function, of which a notebook makes equal ones when a cell
runs again. Other objects stay in `_objects`, so no other object gets their ``id``."""


def is_reference(text: str) -> bool:
    """Whether a text has the form ``module:qualname`` or ``memory:NAME-DIGEST``, with or without options after it.

    >>> is_reference("mine.strategies:Mine:alpha=0.1"), is_reference("groupnorm:groups=4"), is_reference("fedbn")
    (True, False, False)
    """
    first = text.partition(":")[2].partition(":")[0]
    return bool(first) and "=" not in first


def split_options(text: str) -> tuple[str, list[str]]:
    """The name or reference at the start of a text, and the options after it.

    >>> split_options("mine:Mine:alpha=0.1"), split_options("groupnorm:groups=4")
    (('mine:Mine', ['alpha=0.1']), ('groupnorm', ['groups=4']))
    """
    parts = text.split(":")
    names = 2 if is_reference(text) else 1
    return ":".join(parts[:names]), parts[names:]


def reference(value: Any, name: str = "") -> str:
    """The text that names an object in this process; see the module.

    Args:
        value: a class, a function, or any other object, which must not be modified any more.
        name: readable part of the text; by default that of the object or its class.

    Raises:
        UserError: the object cannot be identified by its content.

    >>> reference(Path)
    'pathlib:Path'
    """
    text = importable_name(value)
    if not text:
        named = name or getattr(value, "__name__", "") or type(value).__name__
        text = f"{MEMORY}:{re.sub(r'[^A-Za-z0-9_]+', '_', named).strip('_')}-{digest(value)[:12]}"
    return remember(value, text)


def remember(value: Any, text: str) -> str:
    """Make an object known by a text."""
    is_definition = isinstance(value, Definition)
    _references[id(value)] = text, value if is_definition else None
    if is_definition or text not in _objects:
        _objects[text] = value
    return text


def reference_of(value: Any) -> str | None:
    """The text of an object that was made known; None for others."""
    text, definition = _references.get(id(value), (None, None))
    return text if text is not None and (definition is value or _objects[text] is value) else None


def resolve(text: str, what: str) -> Any:
    """The object with this reference.

    Args:
        text: ``module:qualname`` or ``memory:NAME-DIGEST``.
        what: what the object is, for messages.

    Raises:
        UserError: it cannot be imported, or is not in this process.

    >>> resolve("pathlib:Path", "path")
    <class 'pathlib.Path'>
    """
    module, _, name = text.partition(":")
    if module == MEMORY and text in _objects:
        return _objects[text]
    if not (module and name):
        raise UserError(f"{what} {text!r}: name a function or class as package.module:name")
    if module == MEMORY:
        raise UserError(
            f"{what} {text!r} is an object that this process does not have: create the same object and pass it to "
            "fedbn.compare, fedbn.adapt or fedbn.federate again"
        )
    try:
        value = operator.attrgetter(name)(importlib.import_module(module))
    except ImportError as error:
        raise UserError(f"{what} {text!r}: cannot import {module!r} ({error}); run where it can be imported") from None
    except AttributeError:
        raise unknown(
            f"{what} in {module}", name, [n for n, v in vars(sys.modules[module]).items() if callable(v)]
        ) from None
    except Exception as error:
        raise UserError(f"{what} {text!r}: importing it raises {type(error).__name__}: {error}") from error
    remember(value, text)
    return value


def in_memory(*texts: str) -> list[str]:
    """The references in some texts to objects that other processes cannot import.

    >>> in_memory('{"model": "memory:Net-0123456789ab"}', "fedbn")
    ['memory:Net-0123456789ab']
    """
    return list(dict.fromkeys(found for text in texts for found in _IN_MEMORY.findall(text)))


def require_importable(what: str, *texts: str) -> None:
    """Check that the objects named in some texts can be imported.

    Raises:
        UserError: one cannot.
    """
    if found := in_memory(*texts):
        raise UserError(
            f"{what} starts processes that import what a run needs, and {_described(found[0])}: "
            "define a function or class in a module, and pass it or its name 'module:name'"
        )


def _described(text: str) -> str:
    value = _objects.get(text)
    if inspect.isclass(value) or inspect.isfunction(value):
        name, module = value.__qualname__, value.__module__
        where = "nested in a function" if "<locals>" in name else f"defined in {module}"
        return f"{name} is a lambda" if "<lambda>" in name else f"{name} is {where}"
    return f"{text} is an object of this process"


def save_objects(path: Path, texts: Iterable[str]) -> None:
    """Write the objects in memory that some texts name to a file, for `load_objects` in worker processes.

    Raises:
        UserError: worker processes cannot import a class or function that an object needs.
    """
    import torch

    for text in (names := in_memory(*texts)):
        try:
            torch.save({text: _objects[text]}, path)
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise _not_for_workers(text, str(error)) from None
        if not hasattr(sys.modules["__main__"], "__file__"):
            with zipfile.ZipFile(path) as file:
                record = next(name for name in file.namelist() if name.endswith("data.pkl"))
                if b"__main__" in file.read(record):
                    raise _not_for_workers(text, "it is defined in an interactive session")
    torch.save({text: _objects[text] for text in names}, path)


def _not_for_workers(text: str, reason: str) -> UserError:
    return UserError(
        f"worker processes cannot import what {text} needs ({reason}): define classes and functions in a module, or "
        "set workers=1"
    )


def load_objects(path: Path) -> None:
    """Make the objects of `save_objects` known to this process; their arrays are memory-mapped."""
    import torch

    for text, value in torch.load(path, mmap=True, weights_only=False).items():
        remember(value, text)

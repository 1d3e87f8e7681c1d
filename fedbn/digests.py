"""Digests of Python objects by content: equal objects have equal digests in every process.

Functions and classes that a module defines count by their qualified name. Those of ``__main__`` (a script or a
notebook), nested functions and lambdas have no name that identifies them, so their code, and what it refers to, counts.
"""

from __future__ import annotations

import contextlib
import dataclasses
import dis
import functools
import hashlib
import operator
import pickle
import sys
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedbn.errors import UserError

IGNORED = ("__module__", "__doc__", "__dict__", "__weakref__", "__firstlineno__", "__static_attributes__", "_abc_impl")
"""Attributes of classes without influence on what they compute."""

HASHED_ROWS = 4096
"""Rows of a tensor that are read at once; data that are memory-mapped may not fit in memory."""

Definition = (type, types.FunctionType, types.BuiltinFunctionType)


def importable_name(value: Any) -> str:
    """The name ``module:qualname`` under which another process can import a function or class; empty if there is none.

    >>> importable_name(Path), importable_name(lambda: 1)
    ('pathlib:Path', '')
    """
    module, name = getattr(value, "__module__", None), getattr(value, "__qualname__", None)
    if not isinstance(value, Definition) or not module or not name or module == "__main__":
        return ""
    try:
        return f"{module}:{name}" if operator.attrgetter(name)(sys.modules[module]) is value else ""
    except (KeyError, AttributeError):
        return ""


def digest(value: Any) -> str:
    """SHA-256 of the content of an object.

    Raises:
        UserError: the object, or a part of it, cannot be identified by its content.

    >>> digest({"a": [1, 2.0]}) == digest({"a": [1, 2.0]}), digest(1) == digest(1.0)
    (True, False)
    """
    found = _Digest()
    found.add(value)
    return found.hash.hexdigest()


class _Digest:
    def __init__(self) -> None:
        self.hash = hashlib.sha256()
        self.visited: dict[int, int] = {}

    def text(self, *parts: object) -> None:
        for part in parts:
            data = str(part).encode()
            self.hash.update(f"{len(data)}:".encode() + data)

    def add(self, value: Any) -> None:
        """Add an object."""
        if value is None or value is Ellipsis or isinstance(value, (bool, int, float, complex, str, bytes, Path)):
            return self.text(type(value).__name__, repr(value))
        if isinstance(value, Definition):  # these can refer to themselves
            if id(value) in self.visited:
                return self.text("again", self.visited[id(value)])
            self.visited[id(value)] = len(self.visited)
        if name := importable_name(value):
            return self.text("name", name)
        self._add_content(value)

    def _add_content(self, value: Any) -> None:
        match value:
            case list() | tuple():
                self.text(type(value).__name__, len(value))
                for item in value:
                    self.add(item)
            case set() | frozenset():
                self.text(type(value).__name__, *sorted(digest(item) for item in value))
            case Mapping():
                self.text("mapping", len(value))
                for key, item in sorted(value.items(), key=lambda pair: digest(pair[0])):
                    self.add(key)
                    self.add(item)
            case types.FunctionType():
                self._add_function(value)
            case types.CodeType():
                self._add_code(value)
            case types.MethodType():
                self.add(value.__func__)
                self.add(value.__self__)
            case types.ModuleType():
                self.text("module", value.__name__)
            case functools.partial():
                self.text("partial")
                for part in (value.func, value.args, value.keywords):
                    self.add(part)
            case staticmethod() | classmethod():
                self.text(type(value).__name__)
                self.add(value.__func__)
            case property():
                self.text("property")
                for accessor in (value.fget, value.fset):
                    self.add(accessor)
            case functools.cached_property():
                self.text("cached_property")
                self.add(value.func)
            case type():
                self._add_class(value)
            case _:
                self._add_instance(value)

    def _add_function(self, value: types.FunctionType) -> None:
        self.text("function", value.__qualname__)
        self.add(value.__code__)
        self.add(value.__defaults__)
        self.add(value.__kwdefaults__)
        for cell in value.__closure__ or ():
            with contextlib.suppress(ValueError):  # an empty cell
                self.add(cell.cell_contents)
        for name in _global_names(value.__code__):
            if name in value.__globals__:
                self.text(name)
                self.add(value.__globals__[name])

    def _add_code(self, code: types.CodeType) -> None:
        self.text("code", code.co_code.hex(), code.co_names, code.co_varnames[: code.co_argcount])
        for constant in code.co_consts:
            self.add(constant)

    def _add_class(self, value: type) -> None:
        self.text("class", value.__qualname__)
        if value.__module__ == "builtins":
            return
        for base in value.__bases__:
            self.add(base)
        for name, item in sorted(vars(value).items()):
            is_part = not name.startswith("__") or isinstance(item, types.FunctionType)
            if name not in IGNORED and is_part and not isinstance(item, types.MemberDescriptorType):
                self.text(name)
                self.add(item)

    def _add_instance(self, value: Any) -> None:
        import numpy as np
        import torch
        from torch import nn

        if isinstance(value, torch.Tensor):
            self.text("array", value.dtype, list(value.shape))
            for part in value.detach().split(HASHED_ROWS) if value.dim() else (value.detach(),):
                self.hash.update(part.cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
            return None
        if isinstance(value, (np.ndarray, np.generic)) and value.dtype.kind != "O":
            self.text("array", value.dtype, list(value.shape))
            self.hash.update(np.ascontiguousarray(value).reshape(-1).view(np.uint8).data)
            return None
        if isinstance(value, nn.Module):
            return self._add_module(value)
        self.text("instance")
        self.add(type(value))
        if dataclasses.is_dataclass(value):
            for field in dataclasses.fields(value):
                self.text(field.name)
                self.add(getattr(value, field.name))
            return None
        try:
            self.text(pickle.dumps(value, protocol=4).hex())
        except Exception as error:  # every class may refuse in its own way
            raise UserError(
                f"a {type(value).__name__} cannot be identified by its content ({error}): pass it by a function or "
                "class that a module defines"
            ) from None
        return None

    def _add_module(self, model: Any) -> None:
        for name, module in model.named_modules():
            self.text("module", name)
            self.add(type(module))
            settings = {k: v for k, v in vars(module).items() if not k.startswith("_") and k != "training"}
            self.add({k: v for k, v in settings.items() if isinstance(v, (int, float, str, tuple, type(None)))})
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            self.text(name, tensor.requires_grad)
            self.add(tensor)


def _global_names(code: types.CodeType) -> list[str]:
    """Names of the globals that a function and the functions within it refer to."""
    found = {i.argval for i in dis.get_instructions(code) if i.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
    return sorted(found.union(*(_global_names(part) for part in code.co_consts if isinstance(part, types.CodeType))))

"""Plug-ins and their text form: ``groupnorm:groups=4`` is ``GroupNorm(groups=4)``.

A *plug-in* is a frozen dataclass with a class variable ``name``; its fields are its hyperparameters. A trailing
underscore of a field is not part of its option's name: field ``pass_`` is option ``pass``. Plug-ins are discovered
automatically in the modules of their package and in the entry points of other distributions (group
``fedbn.strategies``, ``fedbn.scenarios``, ...).

A class variable ``aliases`` lists other names. Case, ``-`` and ``_`` do not matter in names and aliases: ``GroupNorm``
is ``groupnorm``. A plug-in is always rendered by its name, so an alias never changes the identity of a result.

A class that is not discovered is named by its reference (`fedbn.objects`): ``mine.strategies:Mine:alpha=0.3`` is
``Mine(alpha=0.3)`` of the module ``mine.strategies``.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import difflib
import importlib
import inspect
import pkgutil
import typing
from collections.abc import Callable, Mapping
from functools import cache, partial
from importlib.metadata import entry_points
from types import NoneType, UnionType
from typing import Any, TypeVar, cast

from fedbn.errors import UserError, unknown
from fedbn.objects import MEMORY, is_reference, reference, reference_of, resolve, split_options

T = TypeVar("T")
Base = type | tuple[type, ...]

_discovered: set[type] = set()
"""Classes that `discover` has found. They are rendered by their name, also where a reference names them."""


@cache
def discover(package: str, base: type[T]) -> dict[str, type[T]]:
    """All concrete subclasses of ``base`` in the modules and entry points of ``package``, by ``name``."""
    found: dict[str, type[T]] = {}
    root = importlib.import_module(package)
    modules = [importlib.import_module(f"{package}.{m.name}") for m in pkgutil.iter_modules(root.__path__)]
    candidates = [c for m in modules for c in vars(m).values() if inspect.isclass(c) and c.__module__ == m.__name__]
    candidates += [e.load() for e in entry_points(group=package)]
    for cls in candidates:
        if issubclass(cls, base) and cls is not base and not inspect.isabstract(cls):
            name = vars(cls).get("name")
            if name is None:
                continue
            if name in found and found[name] is not cls:
                raise UserError(f"two plug-ins of {package} are called {name!r}: rename one of {found[name]}, {cls}")
            found[name] = cls
    found = dict(sorted(found.items()))
    spellings(found)
    _discovered.update(found.values())
    return found


def aliases(cls: type) -> tuple[str, ...]:
    """Other names of a plug-in. A subclass does not inherit them."""
    return tuple(vars(cls).get("aliases", ()))


def title(cls: type) -> str:
    """Readable name of a plug-in, such as ``FedAvg (naive BN)``; its name by default. A subclass does not inherit it.

    >>> from fedbn.strategies.fedbn import FedBN
    >>> title(FedBN), title(type("Own", (FedBN,), {"name": "own"}))
    ('FedBN', 'own')
    """
    return str(vars(cls).get("title", vars(cls)["name"]))


def spellings(known: Mapping[str, type]) -> dict[str, str]:
    """The name of each plug-in by its names and aliases, in lower case without hyphens. A name takes precedence.

    Raises:
        UserError: two plug-ins share an alias.
    """
    found: dict[str, str] = {}
    for name, cls in known.items():
        for alias in map(_spelled, aliases(cls)):
            if found.setdefault(alias, name) != name:
                raise UserError(f"{found[alias]!r} and {name!r} share the alias {alias!r}: remove it from one of them")
    return found | {_spelled(name): name for name in known}


def _spelled(text: str) -> str:
    return text.lower().replace("_", "").replace("-", "")


def is_known(name: str, known: Mapping[str, type]) -> bool:
    """Whether a plug-in has this name or alias."""
    return _spelled(name) in spellings(known)


def find(name: str, kind: str, known: Mapping[str, type[T]]) -> type[T]:
    """The plug-in with this name or alias.

    Raises:
        UserError: there is none; the most similar name is suggested.
    """
    if name in known:
        return known[name]
    if not is_known(name, known):
        raise unknown(kind, name, {*known, *(alias for cls in known.values() for alias in aliases(cls))})
    return known[spellings(known)[_spelled(name)]]


def parse(text: str, kind: str, known: dict[str, type[T]], base: Base | None = None) -> T:
    """Build a plug-in from ``name:field=value:field=value``; the name may be an alias, or a reference.

    A value may have colons: a part without ``=`` continues the value before it.

    Args:
        text: the text.
        kind: kind of plug-in, for messages.
        known: discovered plug-ins.
        base: base class (or classes) of plug-ins that are named by a reference; None to refuse references.

    Raises:
        UserError: unknown name or field (the most similar one is suggested), or a value of the wrong type.
    """
    text = text.strip()
    name, *parts = text.split(":")
    if base is not None and is_reference(text) and not is_known(name, known):
        name, parts = split_options(text)
        cls = _referenced(name, kind, known, base)
        if not isinstance(cls, type):
            return cls
    else:
        cls = find(name, kind, known)
    values: dict[str, str] = {}
    field = ""
    for part in parts:
        if "=" in part:
            field, _, value = part.partition("=")
            values[field] = value
        elif field:
            values[field] += f":{part}"
        else:
            raise UserError(f"{kind} {text!r}: write options as {name}:field=value, not {part!r}")
    return build(cls, values, f"{kind} {name!r}")


def resolve_reference(text: str, kind: str, known: Mapping[str, type]) -> Any:
    """The object with a reference; a misspelled name of a plug-in is reported as such.

    Raises:
        UserError: unknown name, or the object cannot be imported.
    """
    module = text.partition(":")[0]
    if module != MEMORY and "." not in module and difflib.get_close_matches(module, known, n=1):
        raise unknown(kind, module, known)
    return resolve(text, kind)


def _referenced(text: str, kind: str, known: Mapping[str, type[T]], base: Base) -> type[T] | T:
    found: Any = resolve_reference(text, kind, known)
    if not issubclass(found if inspect.isclass(found) else type(found), base):
        raise UserError(f"{kind} {text!r} must be a subclass of {_names(base)}, not {found!r}")
    return found


def _names(base: Base) -> str:
    return " or ".join(cls.__name__ for cls in (base if isinstance(base, tuple) else (base,)))


def text_of(value: Any, kind: str, known: dict[str, type[T]], base: Base) -> str:
    """The text that `parse` converts to ``value``.

    Args:
        value: a text, a plug-in, or the class of one whose options have defaults.
        kind: kind of plug-in, for messages.
        known: discovered plug-ins.
        base: base class (or classes) of the plug-ins.

    Raises:
        UserError: a value of another type, or a class without a name.
    """
    if isinstance(value, str):
        return value
    cls = value if inspect.isclass(value) else type(value)
    if not issubclass(cls, base):
        raise UserError(f"{kind} must be a text or a {_names(base)}, not {value!r}")
    if not getattr(cls, "name", ""):
        raise UserError(f"class {cls.__name__} has no name: add name = {cls.__name__.lower()!r} to it")
    if known.get(cls.name) is not cls:  # type: ignore[attr-defined]
        reference(cls)
    if value is cls:
        value = build(cls, {}, f"{kind} {cls.__name__}")
    text = render(value)
    with contextlib.suppress(UserError, ValueError, TypeError, RuntimeError):
        if parse(text, kind, known, base) == value:
            return text
    return reference(value)


def build(cls: type[T], values: Mapping[str, Any], what: str) -> T:
    """Build ``cls(**values)`` with each value converted to its field's type; errors name the field."""
    hints = typing.get_type_hints(cls) if values else {}  # resolving them takes longer than the rest
    fields = {f.name.rstrip("_"): f for f in dataclasses.fields(cls) if f.init}  # type: ignore[arg-type]
    converted: dict[str, Any] = {}
    for field, value in values.items():
        if field not in fields:
            if not fields:
                raise UserError(f"{what} has no options, so {field!r} cannot be set")
            raise unknown(f"option of {what}", field, fields)
        name = fields[field].name
        converted[name] = convert(value, hints[name], f"{what}, option {field!r}")
    required = [f for f, d in fields.items() if d.default is d.default_factory is dataclasses.MISSING]
    if missing := [f for f in required if fields[f].name not in converted]:
        raise UserError(f"{what} needs a value for {', '.join(missing)}")
    return cls(**converted)


def table(value: Any, what: str) -> dict[str, Any]:
    """Copy of a table of named settings.

    Raises:
        UserError: ``value`` is not a table.
    """
    if not isinstance(value, dict):
        raise UserError(f"{what} must be a table of settings such as {{rounds = 5}}, not {value!r}")
    return dict(value)


def convert(value: Any, hint: Any, what: str) -> Any:
    """Convert ``value`` to the type ``hint``: int, float, bool, str, a tuple or dict of these, or None if allowed."""
    options = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, UnionType) else (hint,)
    if any(typing.get_origin(o) is typing.Literal and value in typing.get_args(o) for o in options):
        return value
    if value is None or (isinstance(value, str) and value.lower() == "none"):
        if NoneType in options:
            return None
        raise UserError(f"{what} cannot be none")
    kind = next(o for o in options if o is not NoneType)
    if isinstance(value, (list, tuple)):
        kind = next((o for o in options if typing.get_origin(o) is tuple), kind)
    if typing.get_origin(kind) is typing.Literal:
        raise unknown(f"value for {what}", str(value), map(str, typing.get_args(kind)))
    if typing.get_origin(kind) is tuple:
        if not isinstance(value, (str, list, tuple)):
            raise UserError(f"{what} must be a list, not {value!r}")
        items = value.replace("+", " ").split() if isinstance(value, str) else value
        return tuple(convert(v, typing.get_args(kind)[0], what) for v in items)
    if typing.get_origin(kind) is dict:
        return {str(k): convert(v, typing.get_args(kind)[1], f"{what}, {k!r}") for k, v in table(value, what).items()}
    try:
        if kind is bool and isinstance(value, str):
            return {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}[value.lower()]
        if kind is int and isinstance(value, float) and value != int(value):
            raise ValueError
        return kind(value)
    except (ValueError, TypeError, KeyError, OverflowError):
        raise UserError(f"{what} must be {kind.__name__}, not {value!r}") from None


def render(plugin: Any) -> str:
    """The shortest text that `parse` converts back to ``plugin``, without options at their defaults."""
    if text := reference_of(plugin):
        return text
    cls = type(plugin)
    text = (None if cls in _discovered else reference_of(cls)) or str(cls.name)
    for f in dataclasses.fields(plugin):
        value = getattr(plugin, f.name)
        if f.init and value != f.default:
            text += f":{f.name.rstrip('_')}=" + ("+".join(map(str, value)) if isinstance(value, tuple) else str(value))
    return text


def callable_of(text: str, kind: str, known: Mapping[str, type], base: Base) -> Callable[..., Any] | None:
    """The callable that a reference names; None for a text that `parse` takes.

    ``module:name:option=value`` sets arguments of the callable. Values are Python literals; anything else is text.

    Args:
        text: the text.
        kind: kind of plug-in that the callable stands for, for messages.
        known: discovered plug-ins.
        base: base class (or classes) of the plug-ins.

    Raises:
        UserError: the object cannot be imported, or cannot be called.

    >>> callable_of("math:isclose:rel_tol=0.5", "function", {}, ())(1.0, 1.4)
    True
    """
    name, options = split_options(text)
    if not is_reference(text) or is_known(name.partition(":")[0], known):
        return None
    found = resolve_reference(name, kind, known)
    if issubclass(found if inspect.isclass(found) else type(found), base):
        return None
    where = f"{kind} {text!r}"
    if not callable(found):
        raise UserError(f"{where} is {type(found).__name__}, which cannot be called: name a function or class")
    if wrong := [option for option in options if "=" not in option]:
        raise UserError(f"{where}: write options as package.module:name:option=value, not {wrong[0]!r}")
    values = {name: _literal(value) for name, _, value in (option.partition("=") for option in options)}
    return partial(found, **values) if values else cast(Callable[..., Any], found)


def callable_text(value: Any, kind: str, known: dict[str, type[T]], base: Base) -> str:
    """Like `text_of`, for plug-ins in whose place a callable can stand.

    >>> callable_text(Mapping.get, "function", {}, ())
    'collections.abc:Mapping.get'
    """
    is_plugin = isinstance(value, (str, base)) or (inspect.isclass(value) and issubclass(value, base))
    return reference(value) if callable(value) and not is_plugin else text_of(value, kind, known, base)


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text

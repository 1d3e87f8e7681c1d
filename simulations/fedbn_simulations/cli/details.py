"""Details of one plug-in: its options with defaults, its paper and the link."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.padding import Padding
from rich.text import Text

from fedbn_simulations.results.papers import link_of, without_link


def describe(known: Mapping[str, type], kind: str, name: str) -> dict[str, Any]:
    """What is known about a plug-in, as values for JSON.

    Args:
        known: plug-ins of one kind, by name.
        kind: what one of them is called.
        name: a name or alias.

    Returns:
        ``name``, ``title``, ``about``, ``source``, ``link``, ``aliases``, and ``options`` with ``name``, ``default``
        and ``about``; empty texts where nothing is known. A protocol also has ``settings``, ``differs`` and
        ``published``.

    Raises:
        UserError: there is no such plug-in; the most similar name is suggested.
    """
    from fedbn.plugins import aliases, find, title

    part: type = find(name, kind, known)
    source = getattr(part, "source", "")
    return {
        "name": vars(part)["name"],
        "title": title(part),
        "about": getattr(part, "about", ""),
        "source": without_link(source),
        "link": link_of(part),
        "aliases": list(aliases(part)),
        "options": _options(part),
        **_protocol(part),
    }


def _protocol(part: type) -> dict[str, Any]:
    """What a protocol sets, how that differs from its source, and the numbers of the source."""
    if not hasattr(part, "published"):
        return {}
    return {
        "settings": part().settings,
        "differs": list(part.differs),  # type: ignore[attr-defined]
        "published": [dataclasses.asdict(number) for number in part.published],
    }


def print_description(found: Mapping[str, Any], console: Console) -> None:
    """Print what `describe` returns."""
    titled = "" if found["title"] == found["name"] else f": {found['title']}"
    console.print(Text(found["name"] + titled, style="bold"))
    console.print(Text(found["about"]))
    source = ", ".join(filter(None, (found["source"], found["link"])))
    for label, text in (("paper", source), ("also called", ", ".join(found["aliases"]))):
        if text:
            console.print(Text(f"{label}: {text}"), soft_wrap=True)
    if "published" in found:
        _print_protocol(found, console)
    if not found["options"]:
        console.print("no options")
        return
    console.print(f"options, written {found['name']}:OPTION=VALUE", highlight=False)
    for option in found["options"]:
        console.print(Text(f"  {option['name']} (default: {option['default']})"))
        if option["about"]:
            console.print(Padding(Text(option["about"]), (0, 0, 0, 6), expand=False))


def _print_protocol(found: Mapping[str, Any], console: Console) -> None:
    for name, value in found["settings"].items():
        console.print(Text(f"sets {name}: {value}"), soft_wrap=True)
    for sentence in found["differs"]:
        console.print(Text(f"differs in {sentence}"), soft_wrap=True)
    for number in found["published"]:
        console.print(Text(f"published: {number['strategy']} {number['value']} ({number['where']})"), soft_wrap=True)
    if not found["published"]:
        console.print("published: no number was verified in the source")


def _options(part: type) -> list[dict[str, str]]:
    """Options with default and description, from the fields of a dataclass and its docstring."""
    if not dataclasses.is_dataclass(part):
        return []
    docs = "\n".join(inspect.cleandoc(cls.__doc__) for cls in reversed(part.__mro__) if cls.__doc__)
    about = {
        name: re.sub(r":math:`|`", "", " ".join(text.split()))
        for name, text in re.findall(r"^    (\w+): (.*(?:\n {5,}.*)*)", docs, flags=re.MULTILINE)
    }
    return [
        {
            "name": f.name.rstrip("_"),
            "default": "required" if f.default is dataclasses.MISSING else str(f.default),
            "about": about.get(f.name, ""),
        }
        for f in dataclasses.fields(part)
        if f.init
    ]

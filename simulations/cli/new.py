"""``fedbn new``: the beginning of a package that adds a strategy."""

from __future__ import annotations

import re
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from fedbn.errors import UserError

console = Console()


class Part(StrEnum):
    """What can be begun."""

    STRATEGY = "strategy"


def new(
    part: Annotated[Part, typer.Argument(help="What to add.")],
    name: Annotated[str, typer.Argument(help="Its name, e.g. my-norm.")],
    out: Annotated[Path | None, typer.Option(help="Directory to make. [default: fedbn-NAME]")] = None,
) -> None:
    """Write a package with a strategy that works, to be changed; fedbn finds it once it is installed.

    Example: [bold]fedbn new strategy my-norm && pip install -e fedbn-my-norm[/]
    """
    place = new_strategy(name, out or Path(f"fedbn-{name}"))
    console.print(f"made {place}; next: pip install -e {place}", soft_wrap=True, highlight=False, markup=False)


def new_strategy(name: str, place: Path) -> Path:
    """Write the package; nothing that is there is overwritten.

    Raises:
        UserError: a name that cannot be one or is taken, or a directory that is not empty or cannot be written.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    from fedbn.strategies.base import strategies

    if not re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", name):
        raise UserError(f"{name!r} cannot be a strategy's name: small letters, digits and single hyphens, e.g. my-norm")
    if name in strategies():
        raise UserError(f"there is a strategy {name!r} already: see `fedbn list strategies`, and choose another name")
    if place.exists() and (not place.is_dir() or any(place.iterdir())):
        raise UserError(f"{place} exists already: choose another --out")
    module = f"fedbn_{name.replace('-', '_')}"
    said = {"name": name, "module": module, "cls": "".join(map(str.capitalize, name.split("-")))}
    environment = Environment(
        loader=PackageLoader("simulations.cli", "templates/strategy"),
        undefined=StrictUndefined,
        keep_trailing_newline=True,
        autoescape=False,  # Python and TOML, and the name is letters and hyphens
    )
    files = {
        "pyproject.toml": "pyproject.toml.j2",
        "README.md": "README.md.j2",
        f"{module}/__init__.py": "strategy.py.j2",
        f"tests/test_{module}.py": "test_strategy.py.j2",
    }
    try:
        for path, template in files.items():
            (place / path).parent.mkdir(parents=True, exist_ok=True)
            (place / path).write_text(environment.get_template(template).render(said), encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write to {place}: {error.strerror or error}; choose another --out") from None
    return place

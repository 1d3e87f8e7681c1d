"""``fedbn new``: generate a package that adds a strategy."""

from __future__ import annotations

import re
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from fedbn.errors import UserError
from fedbn_simulations.cli.options import console


class Part(StrEnum):
    """Kinds of packages that can be generated."""

    STRATEGY = "strategy"


def new(
    part: Annotated[Part, typer.Argument(help="What to add.")],
    name: Annotated[str, typer.Argument(help="Its name, e.g. my-norm.")],
    out: Annotated[Path | None, typer.Option(help="Directory to create.", show_default="fedbn-NAME")] = None,
) -> None:
    """Generate a package with a working strategy to start from. fedbn discovers it once it is installed.

    Example: [bold]fedbn new strategy my-norm && pip install -e fedbn-my-norm[/]
    """
    place = new_strategy(name, out or Path(f"fedbn-{name}"))
    console.print(f"created {place}; next: pip install -e {place}", soft_wrap=True, highlight=False, markup=False)


def new_strategy(name: str, place: Path) -> Path:
    """Write the package. Existing files are never overwritten.

    Raises:
        UserError: an invalid or taken name, or a directory that is not empty or cannot be written.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    from fedbn.plugins import is_known
    from fedbn.strategies.base import strategies

    if not re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", name):
        raise UserError(
            f"{name!r} is not a valid strategy name: use lowercase letters, digits and single hyphens, e.g. my-norm"
        )
    if is_known(name, strategies()):
        raise UserError(f"strategy {name!r} already exists: choose another name (see `fedbn list strategies`)")
    if place.exists() and (not place.is_dir() or any(place.iterdir())):
        raise UserError(f"{place} already exists: choose another --out")
    module = f"fedbn_{name.replace('-', '_')}"
    values = {"name": name, "module": module, "cls": "".join(map(str.capitalize, name.split("-")))}
    environment = Environment(
        loader=PackageLoader("fedbn_simulations.cli", "templates/strategy"),
        undefined=StrictUndefined,
        keep_trailing_newline=True,
        autoescape=False,  # Python and TOML files; the name has only letters, digits and hyphens
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
            (place / path).write_text(environment.get_template(template).render(values), encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write to {place}: {error.strerror or error}; choose another --out") from None
    return place

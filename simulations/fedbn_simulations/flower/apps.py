"""Flower apps in directories: their pyproject.toml, run-config and components."""

from __future__ import annotations

import importlib
import re
import sys
import tomllib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

from fedbn.errors import UserError, unknown
from fedbn_simulations.flower.compat import flatten_config, load_component

CONFIG_FILE = "pyproject.toml"

OWN_PACKAGES = ("fedbn", "fedbn_clients", "fedbn_simulations")
"""Packages of this project; an app may have packages with these names."""
DIRECTORIES = {name: Path(str(importlib.import_module(name).__file__)).parent for name in OWN_PACKAGES}

PAIR = re.compile(r"""[^\s=]+=(?:'[^']*'|"[^"]*"|\S+)""")
"""A pair ``key=value`` in a text, as Flower finds it."""


@dataclass(frozen=True)
class FlowerApp:
    """A Flower app in a directory.

    Attributes:
        directory: absolute path of the directory.
        project: content of its pyproject.toml.
    """

    directory: Path
    project: dict[str, Any]

    @classmethod
    def read(cls, directory: Path) -> FlowerApp:
        """Read the pyproject.toml of an app.

        Raises:
            UserError: the file is missing or not TOML, or does not name the components of an app.
        """
        path = directory.expanduser().resolve() / CONFIG_FILE
        try:
            project = tomllib.loads(path.read_text(encoding="utf-8"))
        except OSError:
            raise UserError(
                f"{directory} is not a Flower app: it has no {CONFIG_FILE}; give the directory of an app"
            ) from None
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise UserError(f"{path} is not valid TOML: {error}") from None
        app = cls(path.parent, project)
        for name in ("serverapp", "clientapp"):
            reference = app._table("tool", "flwr", "app", "components").get(name)
            if not isinstance(reference, str) or len(reference.split(":")) != 2:
                raise UserError(
                    f'{path} names no {name}: add {name} = "package.module:app" to [tool.flwr.app.components]'
                )
        return app

    @property
    def name(self) -> str:
        """Name of the project, or of the directory."""
        return str(self._table("project").get("name", self.directory.name))

    @property
    def default_config(self) -> dict[str, Any]:
        """The run-config of the pyproject.toml, with dotted names."""
        try:
            return flatten_config(self._table("tool", "flwr", "app", "config"))
        except ValueError as error:
            raise UserError(f"{self.directory / CONFIG_FILE}, [tool.flwr.app.config]: {error}") from None

    @property
    def num_supernodes(self) -> int | None:
        """Number of nodes of the default federation; None if the pyproject.toml has none."""
        federations = self._table("tool", "flwr", "federations")
        options = flatten_config(federations.get(str(federations.get("default")), {}))
        return options.get("options.num-supernodes")

    @property
    def model(self) -> str | None:
        """``model`` in ``[tool.fedbn]``: reference of the function or class that builds the app's model."""
        return self._table("tool", "fedbn").get("model")

    @property
    def hidden_packages(self) -> list[str]:
        """Packages of this project that packages of the app hide, because they have the same names."""
        return [name for name in OWN_PACKAGES if (self.directory / name).is_dir()]

    def run_config(self, overrides: Sequence[str] = ()) -> dict[str, Any]:
        """The run-config of a run.

        Args:
            overrides: as of ``flwr run --run-config``: texts ``key=value key="text"``, or the path of one TOML file.

        Raises:
            UserError: an override is not TOML, or names an unknown key.
        """
        config = self.default_config
        for name, value in parse_overrides(overrides).items():
            if name not in config:
                raise unknown("run-config key", name, config)
            config[name] = value
        return config

    @contextmanager
    def loaded(self) -> Iterator[tuple[ServerApp, ClientApp]]:
        """The components; inside the context, imports find the app's own modules first.

        Raises:
            UserError: a component is not found, or is not of the right type.
        """
        components = self._table("tool", "flwr", "app", "components")
        with imports_from(self.directory):
            server = self.load(components["serverapp"])
            client = self.load(components["clientapp"])
            for part, kind in ((server, ServerApp), (client, ClientApp)):
                if not isinstance(part, kind):
                    reference = components[kind.__name__.lower()]
                    raise UserError(f"{reference} is a {type(part).__name__}, not a {kind.__name__}")
            yield server, client

    def load(self, reference: str) -> Any:
        """Object of a reference such as ``package.module:name``; call it inside `loaded`.

        Raises:
            UserError: the module or the name does not exist.
        """
        module, _, attribute = reference.partition(":")
        try:
            return load_component(reference, self.directory)
        except ModuleNotFoundError as error:
            if error.name is not None and f"{module}.".startswith(f"{error.name}."):
                raise UserError(f"{self.directory} has no module {module}, which {reference} names") from None
            if (package := self._hidden_package(error.name)) is not None:
                raise UserError(
                    f"the app's package {package} hides this project's package of the same name, so the app cannot "
                    "import its mods: rename the app's package, or leave the app as it is and use fedbn compare --app"
                ) from None
            raise
        except LookupError:
            raise UserError(f"module {module} of {self.directory} has no {attribute!r}") from None

    def _hidden_package(self, module: str | None) -> str | None:
        """The package of this project that a package of the app hides, if it would have the module."""
        parts = (module or "").split(".")
        if parts[0] not in self.hidden_packages:
            return None
        path = DIRECTORIES[parts[0]].joinpath(*parts[1:])
        return parts[0] if path.is_dir() or path.with_suffix(".py").is_file() else None

    def _table(self, *path: str) -> dict[str, Any]:
        """A table of the pyproject.toml; empty if it is missing."""
        table: Any = self.project
        for name in path:
            table = table.get(name, {}) if isinstance(table, dict) else {}
        return table if isinstance(table, dict) else {}


def parse_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    """Parse the values of ``--run-config``.

    Raises:
        UserError: not TOML, or a file that cannot be read.

    >>> parse_overrides(["lr=0.1 name='my net'", "n=3"])
    {'lr': 0.1, 'name': 'my net', 'n': 3}
    """
    try:
        if len(overrides) == 1 and overrides[0].endswith(".toml"):
            return flatten_config(tomllib.loads(Path(overrides[0]).expanduser().read_text(encoding="utf-8")))
        values: dict[str, Any] = {}
        for text in overrides:
            pairs = PAIR.findall(text)
            if PAIR.sub("", text).strip():
                raise ValueError
            values |= tomllib.loads("\n".join(pairs))
        return flatten_config(values)
    except OSError as error:
        raise UserError(f"cannot read {overrides[0]}: {error.strerror}") from None
    except ValueError:
        example = 'lr=0.1 name="text"'
        raise UserError(f"--run-config takes pairs of TOML such as {example!r}, not {' '.join(overrides)!r}") from None


@contextmanager
def imports_from(directory: Path) -> Iterator[None]:
    """Let imports find modules of a directory first, and forget these modules afterwards.

    Modules of other origin with the same names, such as those of an app that ran before, are hidden in the meantime. An
    app may even have a package with the name of one of this project.
    """
    names = {path.stem for path in directory.iterdir() if path.suffix == ".py" or any(path.glob("*.py"))}

    def modules() -> dict[str, ModuleType]:
        return {name: module for name, module in sys.modules.items() if name.partition(".")[0] in names}

    own = {name for name, module in modules().items() if is_below(module, directory)}
    hidden = {name: module for name, module in modules().items() if name not in own}
    path = list(sys.path)
    for name in hidden:
        del sys.modules[name]
    sys.path.insert(0, str(directory))
    try:
        yield
    finally:
        sys.path[:] = path
        for name in modules():
            if name not in own:
                del sys.modules[name]
        sys.modules.update(hidden)


def is_below(module: ModuleType, directory: Path) -> bool:
    """Whether a module was loaded from a directory."""
    paths = [module.__file__] if getattr(module, "__file__", None) else list(getattr(module, "__path__", []))
    return any(Path(str(path)).resolve().is_relative_to(directory) for path in paths)

"""An app of a user under a normalization strategy, without a change in its code.

The mod of `fedbn_clients.mods` runs around the ClientApp, and every Flower strategy that the ServerApp starts is
wrapped by `fedbn_simulations.flower.strategies`. A strategy that replaces layers, such as ``groupnorm``, is applied to
the function or class that builds the model, wherever the app has imported it, which works if the app builds its model
with it only.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial, wraps
from typing import Any

import torch
from flwr.app import Context, Message
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import Strategy
from torch import nn

from fedbn.errors import UserError
from fedbn.nn.conversion import kinds
from fedbn.nn.roles import Role
from fedbn.strategies.base import NormStrategy
from fedbn.strategies.base import strategy as parse_strategy
from fedbn.strategies.global_naive import GlobalNaive
from fedbn.strategies.ownership import Ownership
from fedbn_clients.entries import Entries, ModelFn, build, entries, model_record, resolve_strategy
from fedbn_clients.mods import normalization as normalization_mod
from fedbn_simulations.flower.apps import FlowerApp, is_below
from fedbn_simulations.flower.strategies import normalization as normalized_strategy

Client = Callable[[Message, Context], Message]
Server = Callable[..., None]


@dataclass(frozen=True)
class NormalizedApp:
    """The components of an app under a strategy.

    Attributes:
        server: the ServerApp.
        client: the ClientApp.
        ownership: owners of the entries of the model.
    """

    server: Server
    client: Client
    ownership: Ownership


@contextmanager
def normalized(app: FlowerApp, model: str | None, strategy: str) -> Iterator[NormalizedApp]:
    """Load an app and apply a strategy to it; under ``global-naive``, the app runs as it is.

    Args:
        app: the app.
        model: reference of the function or class that builds the app's model; None: that of the pyproject.toml.
        strategy: a normalization strategy.

    Raises:
        UserError: the model is unknown or has no normalization layers, or the strategy cannot be applied from outside.
    """
    norms = parse_strategy(strategy)
    kinds()  # imports modules of this project, which a package of the app may hide
    with app.loaded() as (server, client), ExitStack() as stack:
        model_fn, reference = app_model(app, model)
        network = build(model_fn)
        roles = Ownership.of(network, GlobalNaive()).roles
        if not {Role.STATISTICS, Role.AFFINE} & set(roles.values()):
            raise UserError(f"{reference} has no normalization layers, so all strategies are equal: nothing to compare")
        resolve_strategy(norms)
        if norms.syncs_statistics:
            raise UserError(
                f"strategy {norms.name!r} measures statistics on data of the clients, which cannot be had from outside "
                "an app: give the app the mod with calibration=... and the wrapper, or choose global-pooled"
            )
        if isinstance(norms, GlobalNaive):
            yield NormalizedApp(server, client, Ownership.of(network, norms))
        elif _replaces_layers(norms, build(model_fn)):
            converted = stack.enter_context(_converted(app, reference, norms))
            ownership = Ownership.of(build(converted), norms)
            check = _ConvertedModelCheck(reference, norms.name, ownership.roles)
            yield NormalizedApp(server, partial(check, client), ownership)
        else:
            table = entries(model_fn, norms)
            _require_wrappable(server, table)
            wrap = partial(normalized_strategy, model_fn=model_fn, norms=norms)
            started = stack.enter_context(started_strategies(wrap))
            mod = normalization_mod(model_fn, norms)
            yield NormalizedApp(_Wrapped(server, table, started), partial(_call_with_mod, mod, client), table.ownership)


def app_model(app: FlowerApp, model: str | None) -> tuple[ModelFn, str]:
    """The function or class that builds the model of a loaded app, and its reference.

    Raises:
        UserError: it is not known, does not exist, or needs arguments.
    """
    reference = model or app.model
    if reference is None:
        raise UserError(
            "it is not known which function or class builds the PyTorch network of the app: give --model-fn "
            'package.module:Net, or add model = "package.module:Net" to [tool.fedbn] in its pyproject.toml; an app '
            "without a PyTorch network has no normalization to compare or audit"
        )
    if len(reference.split(":")) != 2:
        raise UserError(f"the model is given as package.module:Net, not {reference!r}")
    found = app.load(reference)
    if not callable(found):
        raise UserError(f"{reference} is a {type(found).__name__}, not a function or class that builds a model")
    try:
        build(found)
    except TypeError as error:
        raise UserError(f"{reference} needs arguments ({error}): name a function without any") from None
    return found, reference


def _call_with_mod(mod: Callable[..., Message], client: Client, message: Message, context: Context) -> Message:
    return mod(message, context, client)


def _require_wrappable(server: ServerApp, table: Entries) -> None:
    if server._main is None and _needs_wrapper(table):
        raise UserError(
            f"strategy {table.strategy.name!r} aggregates statistics, which needs a server that uses "
            "flwr.serverapp.strategy, and this app has a server_fn: choose fedbn, silobn or mtfl"
        )


def _needs_wrapper(table: Entries) -> bool:
    return bool(table.ownership.shared_statistics)


@dataclass
class _Wrapped:
    """A ServerApp whose strategies are wrapped; raises an error if it starts none but should."""

    server: ServerApp
    table: Entries
    started: list[Strategy]

    def __call__(self, grid: Grid, context: Context) -> None:
        self.server(grid=grid, context=context)
        if _needs_wrapper(self.table) and not self.started:
            raise UserError(
                f"strategy {self.table.strategy.name!r} aggregates statistics, but the app's server has no start() of "
                "flwr.serverapp.strategy: choose fedbn, silobn or mtfl"
            )


@contextmanager
def started_strategies(wrap: Callable[[Strategy], Strategy] = lambda strategy: strategy) -> Iterator[list[Strategy]]:
    """Collect the Flower strategies that are started in this context, and start ``wrap(strategy)`` instead of each."""
    originals: dict[Any, Any] = {cls: vars(cls)["start"] for cls in _subclasses(Strategy) if "start" in vars(cls)}
    started: list[Strategy] = []
    running: list[Strategy] = []

    def wrapping(start: Callable[..., Any]) -> Callable[..., Any]:
        def start_wrapped(self: Strategy, *args: Any, **kwargs: Any) -> Any:
            if any(self is strategy for strategy in running):  # called by a subclass
                return start(self, *args, **kwargs)
            started.append(self)
            running.append(wrapped := wrap(self))
            try:
                return wrapped.start(*args, **kwargs)
            finally:
                running.pop()

        return start_wrapped

    for cls, start in originals.items():
        cls.start = wrapping(start)
    try:
        yield started
    finally:
        for cls, start in originals.items():
            cls.start = start


def _subclasses(cls: type) -> list[type]:
    children: list[type] = cls.__subclasses__()
    return [cls, *(found for child in children for found in _subclasses(child))]


def _replaces_layers(norms: NormStrategy, model: nn.Module) -> bool:
    before = [type(m) for m in model.modules()]
    prepared = norms.prepare_model(model)
    if prepared is model and [type(m) for m in model.modules()] == before:
        return False
    ownership = Ownership.of(prepared, norms)
    if ownership.retained or ownership.shared_statistics:
        raise UserError(
            f"strategy {norms.name!r} replaces layers and keeps statistics or layers at the clients, which cannot be "
            "done from outside an app: choose fedbn, silobn, global-pooled, groupnorm, ..."
        )
    return True


@contextmanager
def _converted(app: FlowerApp, reference: str, norms: NormStrategy) -> Iterator[ModelFn]:
    """Let the app's class or function build a model with other layers, in every module of the app that has imported it.

    A class is changed in place: with another class under its name, its own ``super(Net, self)`` would not end.
    """
    original = app.load(reference)

    def prepare(model: nn.Module) -> nn.Module:
        with torch.random.fork_rng(devices=[]):  # the app's own random numbers do not change
            return norms.prepare_model(model)

    with ExitStack() as stack:
        if isinstance(original, type):
            init = original.__init__  # type: ignore[misc]

            @wraps(init)
            def converted_init(self: nn.Module, *args: Any, **kwargs: Any) -> None:
                init(self, *args, **kwargs)
                if type(self) is original:
                    prepare(self)

            original.__init__ = converted_init  # type: ignore[misc]
            stack.callback(setattr, original, "__init__", init)
            yield original
            return

        def make(*args: Any, **kwargs: Any) -> nn.Module:
            return prepare(original(*args, **kwargs))

        for module in [m for m in sys.modules.values() if is_below(m, app.directory)]:
            for name in [name for name, value in vars(module).items() if value is original]:
                setattr(module, name, make)
                stack.callback(setattr, module, name, original)
        yield make


@dataclass(frozen=True)
class _ConvertedModelCheck:
    """Checks that the app exchanges the arrays of the model with replaced layers."""

    reference: str
    strategy: str
    roles: Mapping[str, Role]

    def __call__(self, client: Client, message: Message, context: Context) -> Message:
        received = model_record(message.content)[1] if message.has_content() else None
        if received is not None and not message.metadata.message_type.startswith("query"):
            keys = list(received)
            named = set(keys) == set(self.roles)
            if not named and not (all(k.isdigit() for k in keys) and len(keys) == len(self.roles)):
                raise UserError(
                    f"strategy {self.strategy!r} replaces layers of {self.reference}, but the app builds its model in "
                    "another way: replace the layers in the app itself"
                )
        return client(message, context)

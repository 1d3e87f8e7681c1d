"""Base class of the clients' optimizers, and the state that a client can keep between rounds."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fedbn.config import Plan
from fedbn.errors import UserError
from fedbn.nn.roles import State
from fedbn.plugins import callable_of, callable_text, discover, parse, render


@dataclass(frozen=True)
class Optimizer:
    """Base class of optimizers. The fields of a subclass are the options of the optimizer.

    Attributes:
        name: name on the command line.
        about: one-line description.
        default_lr: learning rate if none is given with the optimizer; None for the scenario's.
    """

    name: ClassVar[str]
    about: ClassVar[str]
    default_lr: ClassVar[float | None] = None

    def build(self, parameters: Sequence[nn.Parameter], plan: Plan, lr: float) -> torch.optim.Optimizer:
        """Build the optimizer of one client for one round.

        Args:
            parameters: trained parameters.
            plan: settings.
            lr: learning rate of the round.
        """
        raise NotImplementedError

    def validate(self, plan: Plan) -> None:
        """Check the settings of a plan.

        Raises:
            UserError: the plan has a setting that the optimizer does not use.
        """
        if plan.weight_decay:
            own = any(f.name == "weight_decay" for f in fields(self))
            fix = f"write optimizer {self.name}:weight_decay={plan.weight_decay:g}" if own else "set it in the factory"
            raise UserError(f"weight_decay={plan.weight_decay:g} is an option of sgd only: {fix}")


@dataclass(frozen=True)
class FactoryOptimizer(Optimizer):
    """An optimizer that a callable builds: ``factory(parameters, lr=...)`` or ``factory(parameters)``.

    A factory without an argument ``lr`` sets its own learning rates; the schedule multiplies them.

    Attributes:
        text: name of the factory, for messages.
        factory: builds the optimizer.

    >>> factory = FactoryOptimizer("torch.optim:Adagrad", torch.optim.Adagrad)
    >>> factory.default_lr, factory.build([nn.Parameter(torch.ones(2))], Plan(), 0.5).param_groups[0]["lr"]
    (0.01, 0.5)
    """

    text: str
    factory: Callable[..., torch.optim.Optimizer]

    @property
    def _arguments(self) -> Mapping[str, inspect.Parameter]:
        try:
            return inspect.signature(self.factory).parameters
        except (TypeError, ValueError):
            return {}

    @property
    def default_lr(self) -> float | None:  # type: ignore[override]
        """Default of the factory's argument ``lr``; None without one."""
        default = getattr(self._arguments.get("lr"), "default", None)
        return float(default) if isinstance(default, int | float) else None

    def build(self, parameters: Sequence[nn.Parameter], plan: Plan, lr: float) -> torch.optim.Optimizer:
        takes_lr = any(n == "lr" or p.kind is p.VAR_KEYWORD for n, p in self._arguments.items())
        try:
            built = self.factory(list(parameters), **({"lr": lr} if takes_lr else {}))
        except UserError:
            raise
        except Exception as error:
            raise UserError(
                f"optimizer {self.text!r} could not be built from the parameters of the model: "
                f"{type(error).__name__}: {error}"
            ) from error
        if not isinstance(built, torch.optim.Optimizer):
            raise UserError(f"optimizer {self.text!r} returned a {type(built).__name__}, not a torch.optim.Optimizer")
        if not takes_lr:
            for group in built.param_groups:
                group["lr"] *= lr / plan.lr
        return built


def optimizers() -> dict[str, type[Optimizer]]:
    """All built-in optimizers, by name."""
    return discover("fedbn.optim", Optimizer)


@lru_cache(maxsize=64)
def optimizer(text: str) -> Optimizer:
    """Parse an optimizer such as ``sgd``, ``adamw:weight_decay=0.01`` or ``torch.optim:Adagrad:lr_decay=0.1``.

    Raises:
        UserError: unknown optimizer or option, or the factory cannot be imported.

    >>> optimizer("adamw:weight_decay=0.1")
    AdamW(betas=(0.9, 0.999), eps=1e-08, weight_decay=0.1)
    """
    if (factory := callable_of(text, "optimizer", optimizers(), Optimizer)) is not None:
        return FactoryOptimizer(text, factory)
    return parse(text, "optimizer (or package.module:factory)", optimizers(), Optimizer)


def optimizer_text(value: str | Optimizer | Callable[..., torch.optim.Optimizer]) -> str:
    """The shortest text of an optimizer, after a check of its name and options.

    Args:
        value: a text, a plug-in or its class, or a factory as in `FactoryOptimizer`.

    Raises:
        UserError: as `optimizer`, or another object.

    >>> optimizer_text("adamw:weight_decay=0.01:eps=1e-6"), optimizer_text(torch.optim.Adagrad)
    ('adamw:eps=1e-06', 'torch.optim.adagrad:Adagrad')
    """
    if isinstance(value, FactoryOptimizer):
        return value.text
    found = optimizer(callable_text(value, "optimizer", optimizers(), Optimizer))
    return found.text if isinstance(found, FactoryOptimizer) else render(found)


def load_state(optimizer: torch.optim.Optimizer, named: Mapping[str, nn.Parameter], state: State) -> None:
    """Load a kept state into a new optimizer of the same kind; see `read_state`.

    Args:
        optimizer: the optimizer.
        named: trained parameters by name; entries of others are ignored.
        state: entries by ``ENTRY/PARAMETER``.
    """
    entries: dict[int, dict[str, Tensor]] = {}
    for key, value in state.items():
        entry, _, name = key.partition("/")
        if name in named:
            entries.setdefault(id(named[name]), {})[entry] = value.clone()
    if not entries:
        return
    ordered = [p for group in optimizer.param_groups for p in group["params"]]
    groups = optimizer.state_dict()["param_groups"]
    by_index = {i: entries[id(p)] for i, p in enumerate(ordered) if id(p) in entries}
    optimizer.load_state_dict({"state": by_index, "param_groups": groups})


def read_state(optimizer: torch.optim.Optimizer, named: Mapping[str, nn.Parameter]) -> State:
    """Copy of an optimizer's state by ``ENTRY/PARAMETER``, e.g. ``exp_avg/fc.weight``.

    Raises:
        UserError: the optimizer holds values other than tensors per parameter.
    """
    out: State = {}
    for name, parameter in named.items():
        for entry, value in optimizer.state.get(parameter, {}).items():
            if value is None:
                continue
            if not isinstance(value, Tensor):
                raise UserError(
                    f"{type(optimizer).__name__} holds {entry}, a {type(value).__name__}, which a client cannot keep: "
                    "use optimizer_state=reset"
                )
            out[f"{entry}/{name}"] = value.detach().clone()
    return out


def check_optimizer(plan: Plan, named: Mapping[str, nn.Parameter]) -> None:
    """Check that a plan's optimizer can take a step and that its state can be kept. Changes the parameters.

    Raises:
        UserError: it cannot.
    """
    chosen = optimizer(plan.optimizer)
    chosen.validate(plan)
    if not isinstance(chosen, FactoryOptimizer):
        return
    built: Any = chosen.build(list(named.values()), plan, plan.lr)
    for parameter in named.values():
        parameter.grad = torch.zeros_like(parameter)
    try:
        built.step()
    except Exception as error:
        raise UserError(
            f"optimizer {plan.optimizer!r} cannot take a step without a closure ({type(error).__name__}: {error}): "
            "choose one that steps along the gradient"
        ) from error
    if plan.optimizer_state == "keep":
        read_state(built, named)

"""Compare a stacked program with its model before it is used.

A trace can miss what is not an operation on its input: operations in place, ``torch.no_grad``, or Python code that
depends on values. Such a model would train differently without any error.
"""

from __future__ import annotations

import copy
import logging
import random
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn

from fedbn.nn.roles import State
from fedbn.stacked.joint import same_modules
from fedbn.stacked.layers import Unstackable
from fedbn.stacked.modules import entries
from fedbn.stacked.program import Program, build_program
from fedbn.stacked.vectorized import VMAP, vectorize

log = logging.getLogger(__name__)

ROWS = 8
"""Number of examples of each of the two clients of a check."""

Builder = Callable[[nn.Module, Tensor], Program]
BUILDERS: tuple[Builder, ...] = (lambda model, x: build_program(model), lambda model, x: vectorize(model, x[:ROWS]))
"""Functions that build the program of a model, the fastest program first."""

_checked: WeakKeyDictionary[nn.Module, dict[Any, Builder | str]] = WeakKeyDictionary()
"""How the programs of models are built, or why there is none, by mode and shapes."""


def checked_program(model: nn.Module, x: Tensor, *, trains: bool) -> Program:
    """The fastest stacked program that computes what the model computes in its current mode.

    Models of other runs that differ only in their weights, such as those of other seeds, are not checked again.

    Args:
        model: the model; it does not change.
        x: ``[n, *shape]`` examples.
        trains: whether the program is used for training; otherwise for evaluation.

    Raises:
        Unstackable: no stacked program computes the same.

    >>> type(checked_program(nn.Sequential(nn.Linear(4, 3)), torch.randn(5, 4), trains=True)).__name__
    'GraphProgram'
    >>> type(checked_program(nn.Sequential(nn.Linear(4, 3), nn.PReLU()), torch.randn(5, 4), trains=True)).__name__
    'VectorizedProgram'
    """
    state = model.state_dict(keep_vars=True)
    layout = tuple((name, v.shape, v.dtype, v.device, v.requires_grad) for name, v in state.items())
    key = trains, tuple(m.training for m in model.modules()), layout, min(len(x), ROWS), x.shape[1:], x.dtype
    for other, found in list(_checked.items()):
        if key in found and other is not model and same_modules(other, model, modes=False):
            if isinstance(build := found[key], str):
                raise Unstackable(build)
            return build(model, x)
    results, reasons = _checked.setdefault(model, {}), list[str]()
    for build in BUILDERS:
        try:
            program = build(model, x)
            check_program(program, model, x, trains=trains)
            results[key] = build
            return program
        except Unstackable as reason:
            reasons.append(str(reason))
    log.info("%s runs one by one: %s", type(model).__name__, "; ".join(reasons))
    # What torch.vmap does not support is usually an internal operation, which says nothing to a user.
    shown = [reason for reason in dict.fromkeys(reasons) if not reason.startswith(VMAP)]
    results[key] = "; ".join(shown or reasons)
    raise Unstackable(results[key])


def check_program(program: Program, model: nn.Module, x: Tensor, *, trains: bool = True) -> None:
    """Check that a stacked program computes what its model computes, for two clients in float64.

    Args:
        program: the program of ``model`` in its current mode.
        model: the model; it does not change.
        x: ``[n, *shape]`` examples; at most `ROWS` per client are used.
        trains: compare gradients too; otherwise, check that the outputs of a row do not depend on other rows.

    Raises:
        Unstackable: outputs, gradients, running statistics or dropout masks differ, or cannot be computed.

    >>> net = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.ReLU())
    >>> check_program(build_program(net), net, torch.randn(5, 4))
    """
    x = x.double() if x.is_floating_point() else x
    inputs = [x[:ROWS], x[-ROWS:].flip(0)]  # the same rows if there are few
    try:
        with torch.random.fork_rng(devices=[]), torch.set_grad_enabled(trains):
            exact = _Exact(model)
            expected = [exact.run(own, state) for own, state in zip(inputs, exact.states, strict=True)]
            for batch_last in (False, True) if program.supports_batch_last(x.dim()) else (False,):
                _compare(program, exact, inputs, expected, batch_last=batch_last)
                if not trains and len(x) > 2:
                    _check_rows(program, exact, inputs, batch_last=batch_last)
    except Unstackable:
        raise
    except Exception as error:  # the user's forward may raise anything; the exact executor then reports it
        log.info("stacked program of %s: %s", type(model).__name__, error)
        raise Unstackable(f"the stacked program of {type(model).__name__} differs from the model") from None


class _Exact:
    """A copy of a model in double precision, and the states of two clients."""

    def __init__(self, model: nn.Module) -> None:
        self.model = copy.deepcopy(model).double()
        start = {n: v.clone() for n, v in entries(self.model).items()}
        # The clients differ in all entries, and variances stay positive.
        self.states = [start, {n: v * 1.1 + 0.01 if v.is_floating_point() else v + 1 for n, v in start.items()}]
        self.trained = {n: p for n, p in self.model.named_parameters() if p.requires_grad}

    def run(self, x: Tensor, state: State) -> tuple[Tensor, list[Tensor | None], State]:
        """Outputs, gradients, and the buffers after a forward pass with the first dropout masks."""
        with torch.no_grad():
            for name, value in entries(self.model).items():
                value.copy_(state[name])
        before = _hidden_state(self.model)
        torch.manual_seed(0)
        output: Any = self.model(x.clone())
        if _hidden_state(self.model) != before:
            raise Unstackable("forward changes attributes of the model or draws from a global generator")
        if not isinstance(output, Tensor) or output.dim() < 2:
            raise Unstackable("forward does not return one tensor with an axis of outputs")
        gradients = _gradients(output, list(self.trained.values()))  # the backward pass may update buffers
        after = {n: v.clone() for n, v in self.model.named_buffers() if n in state}
        return output.detach(), gradients, after


def _hidden_state(model: nn.Module) -> Any:
    """Everything that a forward pass can change besides the model's state."""
    attributes = [
        {n: _comparable(v) for n, v in vars(m).items() if n not in ("_parameters", "_buffers", "_modules")}
        for m in model.modules()
    ]
    versions = [p._version for p in model.parameters()]
    drawn: Any = np.random.get_state()
    return attributes, versions, random.getstate(), [v.tobytes() if isinstance(v, np.ndarray) else v for v in drawn]


def _comparable(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_comparable(v) for v in value]
    if isinstance(value, dict):
        return {k: _comparable(v) for k, v in value.items()}
    if isinstance(value, Tensor):
        return id(value), value._version
    return value if isinstance(value, int | float | str | None) else id(value)


def _gradients(outputs: Tensor, parameters: list[Tensor]) -> list[Tensor | None]:
    """Gradients of a weighted sum of the squared outputs; empty if nothing is trained."""
    if not outputs.requires_grad:
        return []
    weights = torch.linspace(0.5, 1.5, outputs.shape[-1], dtype=outputs.dtype, device=outputs.device)
    return list(torch.autograd.grad((weights * outputs**2).sum(), parameters, allow_unused=True))


def _compare(program: Program, exact: _Exact, inputs: list[Tensor], expected: list[Any], *, batch_last: bool) -> None:
    tensors, forward = _bind(program, exact, len(inputs[0]), batch_last=batch_last)
    leaves = [tensors[n].requires_grad_() for n in exact.trained] if torch.is_grad_enabled() else []
    stacked = forward(inputs)
    outputs, gradients, states = zip(*expected, strict=True)
    _assert_close(stacked.detach(), torch.stack(outputs))
    actual = _gradients(stacked, leaves)
    if len(actual) != len(gradients[0]):
        raise Unstackable("gradients differ from those of the model")
    for name, gradient, *own in zip(exact.trained, actual, *gradients):
        if gradient is None or any(g is None for g in own):
            if gradient is not None or any(g is not None for g in own):
                raise Unstackable(f"the gradient of {name} differs from that of the model")
        else:
            _assert_close(gradient, program.lay_out(name, torch.stack(own)))
    for name in states[0]:
        _assert_close(tensors[name], program.lay_out(name, torch.stack([s[name] for s in states])))


def _bind(program: Program, exact: _Exact, rows: int, *, batch_last: bool, on_norm_input: Any = None) -> Any:
    """Entries of both clients in the program's layout, and a function from inputs to outputs ``[2, n, ...]``."""
    states = exact.states
    tensors = {n: program.lay_out(n, torch.stack([s[n] for s in states])).detach() for n in states[0]}
    noise = [torch.Generator(v.device).manual_seed(0) for v in (next(iter(states[0].values())),) * 2]
    forward = program.bind(tensors, 2, noise, batch_last=batch_last, on_norm_input=on_norm_input)

    def outputs(inputs: list[Tensor]) -> Tensor:
        if batch_last:
            return forward(torch.stack([own.flatten(1).T for own in inputs])).mT
        return torch.stack(forward(torch.cat(inputs, 1)).chunk(2, 1))

    return tensors, outputs


def _check_rows(program: Program, exact: _Exact, inputs: list[Tensor], *, batch_last: bool) -> None:
    """Check that outputs and inputs of normalization layers of a row do not depend on the other rows."""
    seen: list[Tensor] = []
    _, forward = _bind(
        program, exact, len(inputs[0]), batch_last=batch_last, on_norm_input=lambda path, x: seen.append(x)
    )
    whole = [forward(inputs), *(x.clone() for x in seen)]
    seen.clear()
    rows = len(inputs[0])
    part = [forward([own[1:-1] for own in inputs]), *seen]
    for i, (actual, full) in enumerate(zip(part, whole, strict=True)):
        axis = 1 if i == 0 else -1 if batch_last else 0
        if full.shape[axis] != rows:
            raise Unstackable("normalization layers do not see one entry per row")
        try:
            _assert_close(actual, full.narrow(axis, 1, rows - 2))
        except AssertionError:
            raise Unstackable("rows of a batch depend on each other in evaluation") from None


def _assert_close(actual: Tensor, expected: Tensor) -> None:
    # torch.testing imports torch.distributed.tensor and SymPy, which takes almost a second.
    same_kind = (actual.shape, actual.dtype) == (expected.shape, expected.dtype)
    if not (same_kind and torch.allclose(actual, expected, rtol=1e-7, atol=1e-9, equal_nan=True)):
        raise AssertionError("tensors are not close")

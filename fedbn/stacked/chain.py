"""Training steps in closed form for chains of linear layers, batch normalizations, ReLU and dropout.

Small layers take about as long as the bookkeeping around them. The derivative of a chain is known, so its step needs no
graph of autograd; and with plain gradient descent, no gradients in memory: each layer adds its change to its parameters
as soon as the gradient of its input is known. Activations are ``[K, C, B]``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedbn.nn.batchnorm import AnyBatchNorm
from fedbn.nn.roles import State
from fedbn.stacked.layers import StackContext, dropout_mask, select_statistics
from fedbn.stacked.program import GraphProgram, Program
from fedbn.tasks import Task


class Operation(Protocol):
    """One layer of a chain, bound to the tensors of K clients."""

    def forward(self, x: Tensor) -> Tensor:
        """Outputs ``[K, C, B]``; ``x`` may be overwritten."""
        ...

    def backward(self, g: Tensor, *, needs_input: bool) -> Tensor:
        """Gradient of the inputs of the last `forward`, if it is needed; changes of parameters are added up."""
        ...


class _Linear:
    def __init__(self, m: Any, context: StackContext, changes: State) -> None:
        self.weight, self.bias = context.tensors["weight"], context.tensors.get("bias")
        self.weight_change, self.bias_change = changes.get("weight"), changes.get("bias")

    def forward(self, x: Tensor) -> Tensor:
        self.x = x
        return torch.bmm(self.weight, x) if self.bias is None else torch.baddbmm(self.bias.mT, self.weight, x)

    def backward(self, g: Tensor, *, needs_input: bool) -> Tensor:
        input_gradient = torch.bmm(self.weight.mT, g) if needs_input else g
        if self.weight_change is not None:
            self.weight_change.baddbmm_(g, self.x.mT)
        if self.bias_change is not None:
            self.bias_change.view(-1).addmv_(g.reshape(-1, g.shape[2]), g.new_ones(g.shape[2]))
        return input_gradient


class _BatchNorm:
    def __init__(self, m: Any, context: StackContext, changes: State) -> None:
        self.module, self.tensors = m, context.tensors
        self.weight = context.tensors.get("weight")
        self.changes = [changes.get("weight"), changes.get("bias")]

    def forward(self, x: Tensor) -> Tensor:
        m, bias = self.module, self.tensors.get("bias")
        self.statistics = mean, variance, batch = select_statistics(m, self.tensors)
        if batch and x.shape[2] == 1:
            raise ValueError("batch normalization needs more than one row in a batch")
        self.rows = x.reshape(1, -1, x.shape[2])
        momentum, eps = m.momentum, m.eps
        out, self.mean, self.scale = torch.native_batch_norm(
            self.rows, self.weight, bias, mean, variance, batch, momentum, eps
        )
        return out.view(x.shape)

    def backward(self, g: Tensor, *, needs_input: bool) -> Tensor:
        mean, variance, batch = self.statistics
        wanted = [needs_input, *(change is not None for change in self.changes)]
        rows = g.reshape(self.rows.shape)
        input_gradient, *gradients = torch.ops.aten.native_batch_norm_backward(
            rows, self.rows, self.weight, mean, variance, self.mean, self.scale, batch, self.module.eps, wanted
        )
        for change, gradient in zip(self.changes, gradients, strict=True):
            if change is not None:
                change.add_(gradient)
        return input_gradient.view(g.shape) if needs_input else g


class _ReLU:
    def __init__(self, m: Any, context: StackContext, changes: State) -> None:
        pass

    def forward(self, x: Tensor) -> Tensor:
        self.out = torch.relu_(x)
        return self.out

    def backward(self, g: Tensor, *, needs_input: bool) -> Tensor:
        return torch.ops.aten.threshold_backward(g, self.out, 0) if needs_input else g


class _Dropout:
    def __init__(self, m: Any, context: StackContext, changes: State) -> None:
        self.context, self.p = context, m.p if m.training else 0.0

    def forward(self, x: Tensor) -> Tensor:
        self.mask = dropout_mask(self.context, x, self.p) if self.p else None
        return x if self.mask is None else x * self.mask

    def backward(self, g: Tensor, *, needs_input: bool) -> Tensor:
        return g if self.mask is None else g * self.mask


_OPERATIONS: dict[Any, Callable[[Any, StackContext, State], Operation]] = {
    nn.Linear: _Linear,
    **dict.fromkeys((nn.BatchNorm1d, AnyBatchNorm), _BatchNorm),
    **dict.fromkeys((nn.ReLU, F.relu, torch.relu, torch.relu_, "relu", "relu_"), _ReLU),
    nn.Dropout: _Dropout,
}


@dataclass(frozen=True)
class Call:
    """One call of a chain: a layer, or a function without parameters, and the names of its tensors."""

    build: Callable[[Any, StackContext, State], Operation]
    module: nn.Module | None = None
    names: tuple[tuple[str, str], ...] = ()


def find_chain(program: Program) -> list[Call] | None:
    """The calls of a program whose steps have a closed form; None if it has other layers, branches or repeated layers.

    >>> from fedbn.stacked.program import build_program
    >>> net = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Identity(), nn.ReLU())
    >>> [call.build.__name__ for call in find_chain(build_program(net))]
    ['_Linear', '_BatchNorm', '_ReLU']
    >>> find_chain(build_program(nn.Sequential(nn.Linear(4, 3), nn.GELU()))) is None
    True
    """
    return _find_chain(program) if isinstance(program, GraphProgram) else None


@lru_cache(maxsize=16)
def _find_chain(program: GraphProgram) -> list[Call] | None:
    calls: list[Call] = []
    previous, *nodes = program.graph.nodes
    for node in nodes:
        if node.all_input_nodes != [previous]:
            return None
        previous = node
        layer = program.layers.get(node.name)
        kind = node.target if layer is None else type(layer.module)
        if node.op == "output" or kind is nn.Identity or program.flattens(node):
            continue
        if kind not in _OPERATIONS:
            return None
        calls.append(Call(_OPERATIONS[kind]) if layer is None else Call(_OPERATIONS[kind], layer.module, layer.names))
    names = [key for call in calls for _, key in call.names]
    return calls if len(set(names)) == len(names) else None


class Chain:
    """The training steps of K clients with one and the same chain.

    Attributes:
        gradients: gradients of the parameters after a step, by name; without them, steps change the parameters.
    """

    def __init__(
        self,
        calls: Sequence[Call],
        tensors: State,
        trained: Sequence[str],
        noise: Sequence[torch.Generator | None],
        k: int,
        lr: float | Tensor | None,
    ) -> None:
        """Bind a chain to the entries of K clients.

        Args:
            calls: the calls of the chain (`find_chain`).
            tensors: entries of the models, in the layout of the program; a step updates statistics in place.
            trained: names of the trainable parameters.
            noise: generator of each client's dropout masks.
            k: number of clients.
            lr: learning rate, also one ``[K]`` per client, with which a step changes the parameters by plain gradient
                descent; None to compute gradients instead.
        """
        used = {key for call in calls for _, key in call.names}.intersection(trained)
        self.gradients = {n: torch.zeros_like(tensors[n]) for n in used} if lr is None else {}
        self._factor = 1.0 if lr is None else -lr if isinstance(lr, float) else -lr.view(k, 1, 1)
        changed = tensors if lr is not None else self.gradients
        self._operations: list[Operation] = []
        self._first = len(calls)  # the first operation with trainable parameters
        for i, call in enumerate(calls):
            context = StackContext(k, {n: tensors[key] for n, key in call.names if key in tensors}, noise, True)
            changes = {n: changed[key] for n, key in call.names if key in used}
            self._first = min(self._first, i) if changes else self._first
            self._operations.append(call.build(call.module, context, changes))

    @torch.no_grad()
    def step(self, x: Tensor, y: Tensor, task: Task) -> Tensor:
        """Take a step, or compute `gradients` of the sum of the clients' mean losses.

        Args:
            x: inputs ``[K, C, B]``; they may be overwritten.
            y: targets ``[K, B, ...]``.
            task: the task, which defines the loss.

        Returns:
            The sum ``[K]`` of the losses of each client's batch.
        """
        for operation in self._operations:
            x = operation.forward(x)
        losses, g = task.stacked_gradients(x, y)
        g.mul_(self._factor / x.shape[2])
        if self.gradients:
            torch._foreach_zero_(list(self.gradients.values()))
        for i in reversed(range(self._first, len(self._operations))):
            g = self._operations[i].backward(g, needs_input=i > self._first)
        return losses.sum(1)

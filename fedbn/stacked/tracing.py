"""Trace a model with ``torch.fx`` so that no operation in place is lost."""

from __future__ import annotations

import operator
from collections.abc import Callable
from functools import partialmethod
from typing import Any, cast

import torch
from torch import fx, nn

from fedbn.stacked.functions import IN_PLACE_FUNCTIONS, VIEW_FUNCTIONS
from fedbn.stacked.layers import VIEW_LAYERS, Unstackable
from fedbn.stacked.modules import stacked_layer


class _Proxy(fx.Proxy):
    """A traced value that also records ``+=`` and similar statements, which `torch.fx` records as ``+``."""

    def _record(self, function: Callable[..., Any], other: Any) -> Any:
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    __iadd__ = partialmethod(_record, operator.iadd)
    __isub__ = partialmethod(_record, operator.isub)
    __imul__ = partialmethod(_record, operator.imul)
    __itruediv__ = partialmethod(_record, operator.itruediv)
    __ipow__ = partialmethod(_record, operator.ipow)


class _Tracer(fx.Tracer):
    proxy_buffer_attributes = True  # otherwise, values that are computed from buffers would become constants

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return stacked_layer(m) is not None or super().is_leaf_module(m, module_qualified_name)


def trace(model: nn.Module) -> fx.Graph:
    """Trace a model in its current training mode.

    Raises:
        Unstackable: the model cannot be traced, or the trace would compute something else.

    >>> [node.op for node in trace(nn.Sequential(nn.ReLU())).nodes]
    ['placeholder', 'call_module', 'output']
    """
    check_structure(model)
    random_state = torch.get_rng_state()
    try:
        graph = _Tracer().trace(model)
    except Exception as error:  # tracing runs the user's forward, which may raise anything
        reason = str(error).partition("\n")[0].partition(". ")[0]
        raise Unstackable(f"forward of {type(model).__name__} cannot be traced: {reason}") from None
    if not torch.equal(random_state, torch.get_rng_state()):
        raise Unstackable("forward draws random numbers that do not depend on its input")
    _check_overwritten(graph, model)
    return graph


def check_structure(model: nn.Module) -> None:
    """Raise `Unstackable` for a model with hooks, patched ``forward`` methods or shared parameters."""
    for path, module in model.named_modules():
        hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
        if any(hooks) or "forward" in vars(module):
            raise Unstackable(f"{path or 'the model'} has hooks")
    if len([*model.named_parameters(remove_duplicate=False)]) != len([*model.parameters()]):
        raise Unstackable("layers share parameters")


def _check_overwritten(graph: fx.Graph, model: nn.Module) -> None:
    """Raise `Unstackable` if a tensor is read after an operation has overwritten it.

    The program computes every operation out of place, which is the same unless the tensor that was overwritten is read
    again, by another name or through a view. The result of the operation itself can be read.
    """
    memory: dict[fx.Node, fx.Node] = {}  # node -> the node that created the memory of its value
    outdated: set[fx.Node] = set()
    for node in graph.nodes:
        if read := outdated.intersection(node.all_input_nodes):
            raise Unstackable(f"{read.pop().name} is overwritten in place and then read")
        module = model.get_submodule(str(node.target)) if node.op == "call_module" else None
        overwrites = bool(
            getattr(module, "inplace", False)
            or node.kwargs.get("inplace")
            or node.target in IN_PLACE_FUNCTIONS
            or (node.op == "call_method" and str(node.target).endswith("_"))
        )
        first = node.args[0] if node.args else None
        shares = isinstance(first, fx.Node) and (
            overwrites or isinstance(module, VIEW_LAYERS) or node.target in VIEW_FUNCTIONS
        )
        memory[node] = memory[cast(fx.Node, first)] if shares else node
        if overwrites:
            outdated |= {other for other in memory if other is not node and memory[other] is memory[node]}

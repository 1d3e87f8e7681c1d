r"""The stacked twin of a model: K clients' networks as one.

Clients lie side by side on the *channel* axis: activations are ``[B, K*C, *positions]``. Then K convolutions are one
grouped convolution, K batch normalizations are one (statistics are per channel anyway), pooling and activation
functions need no change, and a linear layer is a batched product. The sum of the K losses gives every client its own
gradient. Horizontally fused training: Wang, Yang, Zheng, Jiang, Pekhimenko, 2021 (HFTA),
https://arxiv.org/abs/2102.02344

A model is read with ``torch.fx``. Layers are recognized by their exact type: a subclass may compute something else.
Anything unknown makes the model `Unstackable`, and its clients train one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from fedbn.nn.roles import State
from fedbn.stacked.layers import (
    FEATURES,
    FUNCTIONS,
    METHODS,
    OF_FEATURES,
    STACKED_LAYERS,
    TALL,
    Stacked,
    StackedLayer,
    Unstackable,
    as_image,
    batch_norm,
    dropout,
)


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return type(m) in STACKED_LAYERS or super().is_leaf_module(m, module_qualified_name)


@dataclass(frozen=True)
class _Layer:
    """A layer's place in the program: where its tensors are and how it is computed."""

    module: nn.Module
    path: str
    compute: StackedLayer
    names: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Program:
    """The stacked twin of a model in the mode it was read in.

    Attributes:
        graph: what is computed, in order.
        layers: layers by the name of their node in the graph.
        trained: names of the parameters that are trained.
        owner: entry -> the layer it belongs to.
    """

    graph: fx.Graph
    layers: dict[str, _Layer]
    trained: tuple[str, ...]
    owner: dict[str, nn.Module]

    def across(self, axes: int) -> bool:
        """Whether the model knows features only, no positions, so that activations may be laid out ``[K, C, B]``.

        Then no product and no softmax has to copy them first.

        Args:
            axes: of a batch of examples.
        """
        nodes = [n for n in self.graph.nodes if n.op.startswith("call")]
        first = [n for n in nodes if any(a.op == "placeholder" for a in n.all_input_nodes)]
        flattened = all(self._flattens(n) for n in first)
        return (axes == 2 or flattened) and all(
            type(self.layers[n.name].module) in FEATURES if n.op == "call_module" else n.target in OF_FEATURES
            for n in nodes
            if not (flattened and n in first)
        )

    def _flattens(self, node: fx.Node) -> bool:
        if node.op == "call_module":
            module = self.layers[node.name].module
            return type(module) is nn.Flatten and (module.start_dim, module.end_dim) == (1, -1)
        return node.target in (torch.flatten, "flatten") and node.args[1:] == (1,) and not node.kwargs

    @cached_property
    def heavy(self) -> tuple[str, ...]:
        """Trained weights of linear layers with a trained bias: they can step by themselves (`_Stepping`)."""
        linear = [layer for layer in self.layers.values() if type(layer.module) is nn.Linear]
        keys = [dict(layer.names) for layer in linear]
        return tuple(k["weight"] for k in keys if {k["weight"], k.get("bias")} <= set(self.trained))

    @cached_property
    def watched(self) -> list[str]:
        """Paths of the layers with statistics of batches, in the order in which they are computed."""
        calls = [self.layers[n.name] for n in self.graph.nodes if n.op == "call_module"]
        return [layer.path for layer in calls if layer.compute is batch_norm]

    @cached_property
    def draws(self) -> bool:
        """Whether a step needs random numbers."""
        return any(layer.compute is dropout for layer in self.layers.values())

    def laid(self, name: str, stacked: Tensor) -> Tensor:
        """A view of an entry ``[K, *shape]`` as the kernels take it: clients side by side on the channel axis."""
        if type(self.owner[name]) is nn.Linear:
            return stacked.unsqueeze(1) if stacked.dim() == 2 else stacked
        if stacked.dim() == 1 or isinstance(self.owner[name], nn.LayerNorm):
            return stacked
        return stacked.flatten(0, 1)

    def bind(
        self,
        tensors: State,
        k: int,
        noise: Sequence[torch.Generator | None] = (),
        *,
        across: bool = False,
        stepping: Container[str] = (),
        lr: float | None = None,
        watch: Callable[[str, Tensor], None] | None = None,
    ) -> Callable[[Tensor], Tensor]:
        """The forward pass ``[B, K*C, *positions]`` -> ``[B, K*classes]`` of K clients.

        Running statistics and counters in ``tensors`` are updated in place when it is called.

        Args:
            tensors: entries of the models' states, as `laid` lays them out.
            k: number of clients.
            noise: one generator a client, if the model draws any.
            across: whether activations are ``[K, C, B]``, examples last; only if `across` allows it.
            stepping: linear layers' weights, of one client, that step by themselves (`_Stepping`).
            lr: their rate.
            watch: told the path and the input of each layer of `watched` before it is computed.
        """
        steps: list[tuple[fx.Node, Callable[..., Any], bool, Any, dict[str, Any]]] = []
        first = last = next(iter(self.graph.nodes))
        late = {node: pool for node, pool in self._late.items() if not across}
        for node in self.graph.nodes:
            if node.op == "placeholder":
                first = node
            elif node.op == "output":
                last = node.args[0]
            elif node in late or (across and self._flattens(node)):
                steps.append((node, lambda x, *_: x, not across, node.args, {}))
            elif node.op == "call_module":
                layer = self.layers[node.name]
                rate = lr if any(key in stepping for _, key in layer.names) else None
                ctx = Stacked(k, {n: tensors[key] for n, key in layer.names}, noise, across, rate)
                compute: Callable[..., Any] = partial(layer.compute, layer.module, ctx)
                if node in late.values():
                    compute = _then_relu(compute)
                if watch is not None and layer.compute is batch_norm:
                    compute = _told(compute, partial(watch, layer.path))
                steps.append((node, compute, layer.compute in TALL and not across, node.args, {}))
            else:
                compute = METHODS[node.target] if node.op == "call_method" else FUNCTIONS[node.target]
                steps.append((node, compute, False, node.args, node.kwargs))

        def forward(x: Tensor) -> Tensor:
            values: dict[fx.Node, Any] = {first: x}
            tall: set[fx.Node] = set()  # whose value is a signal as an image
            for node, compute, takes_tall, args, kwargs in steps:
                if takes_tall:
                    (source,) = args
                    if source in tall or values[source].dim() == 3:
                        tall.add(node)
                    values[node] = compute(as_image(values[source]))
                    continue
                for other in tall.intersection(node.all_input_nodes):
                    values[other] = values[other].squeeze(2)
                    tall.remove(other)
                values[node] = compute(*[_value(a, values) for a in args], **kwargs)
            return cast(Tensor, values[last].squeeze(2) if last in tall else values[last])

        return forward

    @cached_property
    def _late(self) -> dict[fx.Node, fx.Node]:
        """ReLUs that may as well be applied after the max-pooling that follows: both are monotonic.

        There are fewer numbers then.
        """
        pools = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)

        def module(node: fx.Node) -> nn.Module | None:
            return self.layers[node.name].module if node.op == "call_module" else None

        return {
            relu: node
            for node in self.graph.nodes
            if isinstance(module(node), pools)
            and isinstance(module(relu := node.args[0]), nn.ReLU)
            and len(relu.users) == 1
        }


def _then_relu(compute: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda x: F.relu(compute(x))


def _told(compute: Callable[..., Tensor], tell: Callable[[Tensor], None]) -> Callable[..., Tensor]:
    def told(x: Tensor) -> Tensor:
        tell(x)
        return compute(x)

    return told


def _value(of: Any, values: dict[fx.Node, Any]) -> Any:
    if isinstance(of, fx.Node):
        return values[of]
    return tuple(_value(o, values) for o in of) if isinstance(of, tuple | list) else of


def build_program(model: nn.Module) -> Program:
    """Read a model, in its present training mode, into its stacked twin.

    Raises:
        Unstackable: it has parts that are not known here.

    >>> net = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.ReLU(), nn.Linear(3, 2))
    >>> compute = build_program(net)
    >>> state = {n: compute.laid(n, torch.stack([v, v])) for n, v in net.state_dict().items()}
    >>> x = torch.randn(5, 4)
    >>> torch.allclose(compute.bind(state, 2)(x.repeat(1, 2)), net(x).repeat(1, 2), atol=1e-6)
    True
    """
    refuse_hooks(model)
    if len([*model.named_parameters(remove_duplicate=False)]) != len([*model.parameters()]):
        raise Unstackable("layers share parameters")
    try:
        graph = _Tracer().trace(model)
    except Exception as error:  # tracing runs the user's forward, which may raise anything
        raise Unstackable(f"forward of {type(model).__name__} cannot be traced: {error}") from None
    layers: dict[str, _Layer] = {}
    owner: dict[str, nn.Module] = {}
    inputs = [n for n in graph.nodes if n.op == "placeholder"]
    for node in graph.nodes:
        if node.op == "call_module":
            module = model.get_submodule(str(node.target))
            layers[node.name] = _layer(module, str(node.target), node)
            owner |= dict.fromkeys((key for _, key in layers[node.name].names), module)
        elif node.op == "call_method" and node.target not in METHODS:
            raise Unstackable(f"method {node.target}")
        elif node.op == "call_function" and node.target not in FUNCTIONS:
            raise Unstackable(f"function {getattr(node.target, '__name__', node.target)}")
        elif any(isinstance(v, fx.Node) for v in node.kwargs.values()):
            raise Unstackable(f"{node.target} with computed options")
        elif node.op == "get_attr":
            raise Unstackable(f"{node.target}, a tensor outside the usual layers")
    output = next(n for n in graph.nodes if n.op == "output")
    if len(inputs) != 1 or not isinstance(output.args[0], fx.Node):
        raise Unstackable(f"forward of {type(model).__name__} does not turn one tensor into one")
    if idle := [n for n in model.state_dict() if n not in owner]:
        raise Unstackable(f"{idle[0]} is not used in forward")
    trained = tuple(n for n, p in model.named_parameters() if p.requires_grad)
    return Program(graph, layers, trained, owner)


def refuse_hooks(model: nn.Module) -> None:
    """Raise for a model that does something besides its layers' own forward pass."""
    for path, module in model.named_modules():
        hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
        if any(hooks) or "forward" in vars(module):
            raise Unstackable(f"{path or 'the model'} has hooks")


def _layer(module: nn.Module, path: str, node: fx.Node) -> _Layer:
    kind = type(module)
    if kind not in STACKED_LAYERS:
        raise Unstackable(f"layer {kind.__name__}")
    if len(node.args) != 1 or node.kwargs:
        raise Unstackable(f"{path} is called with more than one argument")
    if getattr(module, "padding_mode", "zeros") != "zeros":
        raise Unstackable(f"{path} pads with {module.padding_mode}")
    if STACKED_LAYERS[kind] is batch_norm and module.momentum is None:
        raise Unstackable(f"{path} averages cumulatively (momentum=None)")
    if getattr(module, "return_indices", False):
        raise Unstackable(f"{path} returns indices")
    return _Layer(module, path, STACKED_LAYERS[kind], tuple((n, f"{path}.{n}") for n in module.state_dict()))

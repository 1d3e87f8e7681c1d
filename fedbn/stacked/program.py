r"""The stacked program of a model: the networks of K clients as one.

Clients are concatenated on the *channel* axis: activations are ``[B, K*C, *positions]``. K convolutions become one
grouped convolution, K batch normalizations become one (their statistics are per channel), pooling and activation
functions do not change, and a linear layer is a batched matrix product. The gradient of the sum of the K losses
contains each client's own gradient. Horizontally fused training: Wang, Yang, Zheng, Jiang, Pekhimenko,
2021 (HFTA), https://arxiv.org/abs/2102.02344

Models are traced with ``torch.fx``. Layers are matched by their exact type, because a subclass may compute something
else. A model with an unsupported part is `Unstackable`; `fedbn.stacked.vectorized` is slower but supports more.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Protocol, cast

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from fedbn.nn.roles import State, keeps_statistics
from fedbn.stacked.functions import DROPOUT_FUNCTIONS, FEATURE_FUNCTIONS, FUNCTIONS, METHODS
from fedbn.stacked.layers import (
    LINEAR_LAYERS,
    StackContext,
    StackedLayer,
    Unstackable,
    as_image,
    batch_norm,
    dropout,
)
from fedbn.stacked.modules import (
    OWN_CODE,
    accepts_features,
    accepts_images,
    channelwise,
    entries,
    stacked_layer,
    with_tensors,
)
from fedbn.stacked.tracing import trace


@dataclass(frozen=True)
class _Layer:
    """A layer of the program, with the names of its tensors and its stacked implementation."""

    module: nn.Module
    path: str
    compute: StackedLayer
    names: tuple[tuple[str, str], ...]

    @property
    def is_batch_norm(self) -> bool:
        """Whether the layer normalizes by statistics of batches."""
        return self.compute is batch_norm or (self.compute is channelwise and keeps_statistics(self.module))


class Program(Protocol):
    """The networks of K clients as one function, for the mode in which the model was when it was built."""

    @property
    def trained(self) -> tuple[str, ...]:
        """Names of the trainable parameters."""
        ...

    @property
    def fusable_weights(self) -> tuple[str, ...]:
        """Trainable weights of linear layers with a trainable bias, which `_FusedLinearStep` can update."""
        ...

    @property
    def norm_paths(self) -> list[str]:
        """Paths of the batch normalization layers, in the order of computation."""
        ...

    @property
    def draws_noise(self) -> bool:
        """Whether a training step draws random numbers."""
        ...

    def supports_batch_last(self, axes: int) -> bool:
        """Whether the model has only features, without positions, so that activations can be ``[K, C, B]``.

        This layout saves copies before matrix products and the softmax.

        Args:
            axes: number of axes of a batch of examples.
        """
        ...

    def lay_out(self, name: str, stacked: Tensor) -> Tensor:
        """View an entry ``[K, *shape]`` in the layout of the kernels."""
        ...

    def bind(
        self,
        tensors: State,
        k: int,
        noise: Sequence[torch.Generator | None] = (),
        *,
        batch_last: bool = False,
        fused_weights: Container[str] = (),
        lr: float | None = None,
        on_norm_input: Callable[[str, Tensor], None] | None = None,
    ) -> Callable[[Tensor], Tensor]:
        """Build the forward pass ``[B, K*C, *positions]`` -> ``[B, K*outputs, *positions]`` of K clients.

        Each call updates the running statistics and counters in ``tensors`` in place.

        Args:
            tensors: entries of the models' states, in the layout of `lay_out`.
            k: number of clients.
            noise: one generator per client, if the model draws random numbers.
            batch_last: use activations ``[K, C, B]``; requires `supports_batch_last`.
            fused_weights: weights of linear layers that `_FusedLinearStep` updates; only for one client.
            lr: learning rate of ``fused_weights``.
            on_norm_input: called with the path and the input of each layer of `norm_paths` before it is computed.
        """
        ...


@dataclass(frozen=True, eq=False)
class GraphProgram:
    """A `Program` from the traced graph of a model.

    Attributes:
        graph: the traced graph.
        layers: node name -> layer.
        trained: names of the trainable parameters.
        owner: entry name -> the module that owns it.
    """

    graph: fx.Graph
    layers: dict[str, _Layer]
    trained: tuple[str, ...]
    owner: dict[str, nn.Module]

    def supports_batch_last(self, axes: int) -> bool:
        """As in `Program`."""
        return (axes == 2 or self._flattens_inputs) and self._has_only_features

    @cached_property
    def _flattens_inputs(self) -> bool:
        return all(self.flattens(node) for node in self._first_calls)

    @cached_property
    def _has_only_features(self) -> bool:
        skipped = self._first_calls if self._flattens_inputs else []
        return all(
            accepts_features(self.layers[n.name].module) if n.op == "call_module" else n.target in FEATURE_FUNCTIONS
            for n in self.graph.nodes
            if n.op.startswith("call") and n not in skipped
        )

    @property
    def _first_calls(self) -> list[fx.Node]:
        """The calls that take the input."""
        calls = [n for n in self.graph.nodes if n.op.startswith("call")]
        return [n for n in calls if any(a.op == "placeholder" for a in n.all_input_nodes)]

    def flattens(self, node: fx.Node) -> bool:
        """Whether a call flattens all axes but the batch."""
        if node.op == "call_module":
            module = self.layers[node.name].module
            return type(module) is nn.Flatten and (module.start_dim, module.end_dim) == (1, -1)
        return node.target in (torch.flatten, "flatten") and node.args[1:] == (1,) and not node.kwargs

    @cached_property
    def fusable_weights(self) -> tuple[str, ...]:
        """As in `Program`."""
        keys = [dict(layer.names) for layer in self.layers.values() if type(layer.module) is nn.Linear]
        calls = Counter(k["weight"] for k in keys)  # a layer that runs twice needs its weight for both gradients
        trained = set(self.trained)
        return tuple(k["weight"] for k in keys if {k["weight"], k.get("bias")} <= trained and calls[k["weight"]] == 1)

    @cached_property
    def norm_paths(self) -> list[str]:
        """As in `Program`."""
        calls = [self.layers[n.name] for n in self.graph.nodes if n.op == "call_module"]
        return [layer.path for layer in calls if layer.is_batch_norm]

    @cached_property
    def draws_noise(self) -> bool:
        """As in `Program`."""
        return any(layer.compute is dropout for layer in self.layers.values()) or any(
            node.target in DROPOUT_FUNCTIONS for node in self.graph.nodes
        )

    def lay_out(self, name: str, stacked: Tensor) -> Tensor:
        """View an entry ``[K, *shape]`` in the layout of the kernels, with the clients on the channel axis."""
        owner = self.owner.get(name)  # None if the entry is not used
        if type(owner) in LINEAR_LAYERS:
            return stacked.unsqueeze(1) if stacked.dim() == 2 else stacked
        if stacked.dim() == 1 or owner is None or isinstance(owner, nn.LayerNorm):
            return stacked
        return stacked.flatten(0, 1)

    def bind(
        self,
        tensors: State,
        k: int,
        noise: Sequence[torch.Generator | None] = (),
        *,
        batch_last: bool = False,
        fused_weights: Container[str] = (),
        lr: float | None = None,
        on_norm_input: Callable[[str, Tensor], None] | None = None,
    ) -> Callable[[Tensor], Tensor]:
        """As in `Program`."""
        context = StackContext(k, {}, noise, batch_last)
        steps: list[tuple[fx.Node, Callable[..., Any], bool, Any, dict[str, Any]]] = []
        input_node = output_node = next(iter(self.graph.nodes))
        delayed = {node: pool for node, pool in self._delayed_relus.items() if not batch_last}
        for node in self.graph.nodes:
            if node.op == "placeholder":
                input_node = node
            elif node.op == "output":
                output_node = node.args[0]
            elif node in delayed or (batch_last and self.flattens(node)):
                steps.append((node, lambda x, *_: x, not batch_last, node.args, {}))
            elif node.op == "call_module":
                layer = self.layers[node.name]
                rate = lr if any(key in fused_weights for _, key in layer.names) else None
                own = {n: tensors[key] for n, key in layer.names if key in tensors}
                ctx = StackContext(k, own, noise, batch_last, rate)
                module = with_tensors(layer.module, own) if layer.compute in OWN_CODE else layer.module
                compute: Callable[..., Any] = partial(layer.compute, module, ctx)
                if node in delayed.values():
                    compute = _then_relu(compute)
                if on_norm_input is not None and layer.is_batch_norm:
                    compute = _with_callback(compute, partial(on_norm_input, layer.path))
                steps.append((node, compute, accepts_images(layer.compute) and not batch_last, node.args, {}))
            else:
                compute = METHODS[node.target] if node.op == "call_method" else FUNCTIONS[node.target]
                compute = partial(compute, context)
                steps.append((node, compute, False, node.args, node.kwargs))

        def forward(x: Tensor) -> Tensor:
            values: dict[fx.Node, Any] = {input_node: x}
            images: set[fx.Node] = set()  # nodes whose value is a signal stored as an image
            for node, compute, takes_images, args, kwargs in steps:
                if takes_images:
                    (source,) = args
                    if source in images or values[source].dim() == 3:
                        images.add(node)
                    values[node] = compute(as_image(values[source]))
                    continue
                for other in images.intersection(node.all_input_nodes):
                    values[other] = values[other].squeeze(2)
                    images.remove(other)
                values[node] = compute(*[_resolve(a, values) for a in args], **_resolve(kwargs, values))
            output = values[output_node]
            return cast(Tensor, output.squeeze(2) if output_node in images else output)

        return forward

    @cached_property
    def _delayed_relus(self) -> dict[fx.Node, fx.Node]:
        """ReLU -> the max-pooling after which it is applied instead.

        Both are monotonic, so the order does not matter, and the pooled activations are smaller.
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


def _with_callback(compute: Callable[..., Tensor], callback: Callable[[Tensor], None]) -> Callable[..., Tensor]:
    def wrapped(x: Tensor) -> Tensor:
        callback(x)
        return compute(x)

    return wrapped


def _resolve(argument: Any, values: dict[fx.Node, Any]) -> Any:
    if isinstance(argument, fx.Node):
        return values[argument]
    if isinstance(argument, tuple | list):
        return tuple(_resolve(a, values) for a in argument)
    if isinstance(argument, slice):
        return slice(*[_resolve(a, values) for a in (argument.start, argument.stop, argument.step)])
    return {k: _resolve(v, values) for k, v in argument.items()} if isinstance(argument, dict) else argument


def build_program(model: nn.Module) -> GraphProgram:
    """Trace a model, in its current training mode, and build its stacked program.

    Use `fedbn.stacked.check.checked_program` for models of users: a trace can miss operations.

    Raises:
        Unstackable: the model has unsupported parts.

    >>> net = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.ReLU(), nn.Linear(3, 2))
    >>> program = build_program(net)
    >>> state = {n: program.lay_out(n, torch.stack([v, v])) for n, v in net.state_dict().items()}
    >>> x = torch.randn(5, 4)
    >>> torch.allclose(program.bind(state, 2)(x.repeat(1, 2)), net(x).repeat(1, 2), atol=1e-6)
    True
    """
    graph = trace(model)
    layers: dict[str, _Layer] = {}
    owner: dict[str, nn.Module] = {}
    inputs = [n for n in graph.nodes if n.op == "placeholder"]
    for node in graph.nodes:
        if node.op == "call_module":
            module = model.get_submodule(str(node.target))
            layers[node.name] = _layer(module, str(node.target), node)
            owner |= dict.fromkeys((key for _, key in layers[node.name].names), module)
        elif node.op == "call_method" and node.target not in METHODS:
            raise Unstackable(f"method {node.target} is not supported")
        elif node.op == "call_function" and node.target not in FUNCTIONS:
            raise Unstackable(f"function {getattr(node.target, '__name__', node.target)} is not supported")
        elif "out" in node.kwargs:
            raise Unstackable(f"{node.target} writes to a given tensor")
        elif node.op == "get_attr":
            raise Unstackable(f"{node.target}, a tensor that no supported layer owns")
    output = next(n for n in graph.nodes if n.op == "output")
    if len(inputs) != 1 or not isinstance(output.args[0], fx.Node):
        raise Unstackable(f"forward of {type(model).__name__} does not map one tensor to one tensor")
    trained = tuple(n for n, p in model.named_parameters() if p.requires_grad)
    return GraphProgram(graph, layers, trained, owner)


def _layer(module: nn.Module, path: str, node: fx.Node) -> _Layer:
    kind = type(module)
    compute = stacked_layer(module)
    if compute is None:
        raise Unstackable(f"layer {kind.__name__} is not supported")
    if len(node.args) != 1 or node.kwargs:
        raise Unstackable(f"{path} is called with more than one argument")
    if getattr(module, "padding_mode", "zeros") != "zeros":
        raise Unstackable(f"{path} pads with {module.padding_mode}")
    if compute in (batch_norm, channelwise) and getattr(module, "momentum", 0) is None:
        raise Unstackable(f"{path} averages cumulatively (momentum=None)")
    if getattr(module, "return_indices", False):
        raise Unstackable(f"{path} returns indices")
    return _Layer(module, path, compute, tuple((n, f"{path}.{n}") for n in entries(module)))

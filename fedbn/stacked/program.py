r"""The stacked program of a model: the networks of K clients as one.

Clients are concatenated on the *channel* axis: activations are ``[B, K*C, *positions]``. K convolutions become one
grouped convolution, K batch normalizations become one (their statistics are per channel), pooling and activation
functions do not change, and a linear layer is a batched matrix product. The gradient of the sum of the K losses
contains each client's own gradient. Horizontally fused training: Wang, Yang, Zheng, Jiang, Pekhimenko,
2021 (HFTA), https://arxiv.org/abs/2102.02344

Models are traced with ``torch.fx``. Layers are matched by their exact type, because a subclass may compute something
else. A model with an unsupported part is `Unstackable`, and its clients train one by one.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from fedbn.nn.roles import State
from fedbn.stacked.layers import (
    FEATURE_FUNCTIONS,
    FEATURE_LAYERS,
    FUNCTIONS,
    IMAGE_LAYERS,
    METHODS,
    STACKED_LAYERS,
    StackContext,
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
    """A layer of the program, with the names of its tensors and its stacked implementation."""

    module: nn.Module
    path: str
    compute: StackedLayer
    names: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Program:
    """The stacked program of a model, in the mode in which the model was traced.

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
        """Whether the model has only features, without positions, so that activations can be ``[K, C, B]``.

        This layout saves copies before matrix products and the softmax.

        Args:
            axes: number of axes of a batch of examples.
        """
        nodes = [n for n in self.graph.nodes if n.op.startswith("call")]
        first = [n for n in nodes if any(a.op == "placeholder" for a in n.all_input_nodes)]
        flattened = all(self._flattens(n) for n in first)
        return (axes == 2 or flattened) and all(
            type(self.layers[n.name].module) in FEATURE_LAYERS
            if n.op == "call_module"
            else n.target in FEATURE_FUNCTIONS
            for n in nodes
            if not (flattened and n in first)
        )

    def _flattens(self, node: fx.Node) -> bool:
        if node.op == "call_module":
            module = self.layers[node.name].module
            return type(module) is nn.Flatten and (module.start_dim, module.end_dim) == (1, -1)
        return node.target in (torch.flatten, "flatten") and node.args[1:] == (1,) and not node.kwargs

    @cached_property
    def fusable_weights(self) -> tuple[str, ...]:
        """Trainable weights of linear layers with a trainable bias, which `_FusedLinearStep` can update."""
        linear = [layer for layer in self.layers.values() if type(layer.module) is nn.Linear]
        keys = [dict(layer.names) for layer in linear]
        return tuple(k["weight"] for k in keys if {k["weight"], k.get("bias")} <= set(self.trained))

    @cached_property
    def norm_paths(self) -> list[str]:
        """Paths of the batch normalization layers, in the order of computation."""
        calls = [self.layers[n.name] for n in self.graph.nodes if n.op == "call_module"]
        return [layer.path for layer in calls if layer.compute is batch_norm]

    @cached_property
    def draws_noise(self) -> bool:
        """Whether a training step draws random numbers."""
        return any(layer.compute is dropout for layer in self.layers.values())

    def lay_out(self, name: str, stacked: Tensor) -> Tensor:
        """View an entry ``[K, *shape]`` in the layout of the kernels, with the clients on the channel axis."""
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
        batch_last: bool = False,
        fused_weights: Container[str] = (),
        lr: float | None = None,
        on_norm_input: Callable[[str, Tensor], None] | None = None,
    ) -> Callable[[Tensor], Tensor]:
        """Build the forward pass ``[B, K*C, *positions]`` -> ``[B, K*classes]`` of K clients.

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
        steps: list[tuple[fx.Node, Callable[..., Any], bool, Any, dict[str, Any]]] = []
        input_node = output_node = next(iter(self.graph.nodes))
        delayed = {node: pool for node, pool in self._delayed_relus.items() if not batch_last}
        for node in self.graph.nodes:
            if node.op == "placeholder":
                input_node = node
            elif node.op == "output":
                output_node = node.args[0]
            elif node in delayed or (batch_last and self._flattens(node)):
                steps.append((node, lambda x, *_: x, not batch_last, node.args, {}))
            elif node.op == "call_module":
                layer = self.layers[node.name]
                rate = lr if any(key in fused_weights for _, key in layer.names) else None
                ctx = StackContext(k, {n: tensors[key] for n, key in layer.names}, noise, batch_last, rate)
                compute: Callable[..., Any] = partial(layer.compute, layer.module, ctx)
                if node in delayed.values():
                    compute = _then_relu(compute)
                if on_norm_input is not None and layer.compute is batch_norm:
                    compute = _with_callback(compute, partial(on_norm_input, layer.path))
                steps.append((node, compute, layer.compute in IMAGE_LAYERS and not batch_last, node.args, {}))
            else:
                compute = METHODS[node.target] if node.op == "call_method" else FUNCTIONS[node.target]
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
                values[node] = compute(*[_resolve(a, values) for a in args], **kwargs)
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
    return tuple(_resolve(a, values) for a in argument) if isinstance(argument, tuple | list) else argument


def build_program(model: nn.Module) -> Program:
    """Trace a model, in its current training mode, and build its stacked program.

    Raises:
        Unstackable: the model has unsupported parts.

    >>> net = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.ReLU(), nn.Linear(3, 2))
    >>> program = build_program(net)
    >>> state = {n: program.lay_out(n, torch.stack([v, v])) for n, v in net.state_dict().items()}
    >>> x = torch.randn(5, 4)
    >>> torch.allclose(program.bind(state, 2)(x.repeat(1, 2)), net(x).repeat(1, 2), atol=1e-6)
    True
    """
    check_no_hooks(model)
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
            raise Unstackable(f"{node.target} with computed keyword arguments")
        elif node.op == "get_attr":
            raise Unstackable(f"{node.target}, a tensor that no supported layer owns")
    output = next(n for n in graph.nodes if n.op == "output")
    if len(inputs) != 1 or not isinstance(output.args[0], fx.Node):
        raise Unstackable(f"forward of {type(model).__name__} does not map one tensor to one tensor")
    if unused := [n for n in model.state_dict() if n not in owner]:
        raise Unstackable(f"{unused[0]} is not used in forward")
    trained = tuple(n for n, p in model.named_parameters() if p.requires_grad)
    return Program(graph, layers, trained, owner)


def check_program(program: Program, model: nn.Module, x: Tensor) -> None:
    """Check that a stacked program computes what its model computes, for two clients in float64.

    Tracing loses in-place operations, so a tensor that is overwritten and read again would have another value.

    Args:
        program: the program of ``model`` in its current mode.
        model: the model.
        x: ``[n, *shape]`` example inputs, at least two.

    Raises:
        Unstackable: outputs or running statistics differ, or one of the two cannot be computed.

    >>> net = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.ReLU())
    >>> check_program(build_program(net), net, torch.randn(5, 4))
    """
    inputs, outputs, states = [x.double(), x.double().flip(0)], [], []
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            for own in inputs:
                exact = copy.deepcopy(model).double()
                torch.manual_seed(0)
                outputs.append(exact(own.clone()))
                states.append(exact.state_dict())
            start = copy.deepcopy(model).double().state_dict()
            for batch_last in (False, True) if program.supports_batch_last(x.dim()) else (False,):
                entries = {n: program.lay_out(n, torch.stack([v, v])) for n, v in start.items()}
                noise = [torch.Generator(x.device).manual_seed(0) for _ in inputs]
                forward = program.bind(entries, 2, noise, batch_last=batch_last)
                stacked = (
                    forward(torch.stack([own.flatten(1).T for own in inputs])).mT
                    if batch_last
                    else torch.stack(forward(torch.cat(inputs, 1)).chunk(2, 1))
                )
                pairs = [(stacked, torch.stack(outputs))]
                pairs += [(entries[n], program.lay_out(n, torch.stack([s[n] for s in states]))) for n in entries]
                for actual, expected in pairs:
                    torch.testing.assert_close(actual, expected, rtol=1e-7, atol=1e-9, equal_nan=True)
    except Unstackable:
        raise
    except Exception as error:  # the user's forward may raise anything; the exact executor then reports it
        reason = str(error).strip().partition("\n")[0]
        raise Unstackable(f"the stacked program of {type(model).__name__} differs from the model: {reason}") from None


def check_no_hooks(model: nn.Module) -> None:
    """Raise `Unstackable` for a model with hooks or patched ``forward`` methods."""
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

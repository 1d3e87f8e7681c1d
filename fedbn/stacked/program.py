r"""The stacked twin of a model: K clients' networks as one.

Clients lie side by side on the *channel* axis: activations are ``[B, K*C, *positions]``. Then K convolutions are one
grouped convolution, K batch normalisations are one (statistics are per channel anyway), pooling and activation
functions need no change, and a linear layer is a batched product. The sum of the K losses gives every client its own
gradient. Horizontally fused training: Wang, Yang, Zheng, Jiang, Pekhimenko, 2021 (HFTA),
https://arxiv.org/abs/2102.02344

A model is read with ``torch.fx``. Layers are recognised by their exact type: a subclass may compute something else.
Anything unknown makes the model `Unstackable`, and its clients train one by one.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from fedbn.layers import AnyBatchNorm, AnyInstanceNorm
from fedbn.roles import State


class Unstackable(Exception):
    """A model, or a way of training it, that has no stacked twin; the message says why."""


@dataclass(frozen=True)
class Stacked:
    """What a twin is given besides activations.

    Attributes:
        k: number of clients.
        tensors: parameters and buffers of the layer by their names in it, laid out by `laid`.
        noise: a generator per client, from which dropout draws.
        across: whether activations are ``[K, C, B]``.
        lr: if given, the layer's weight takes its step of this rate in the backward pass (`_Stepping`).
    """

    k: int
    tensors: State
    noise: Sequence[torch.Generator | None]
    across: bool = False
    lr: float | None = None


Twin = Callable[[Any, Stacked, Tensor], Tensor]
"""Computes a layer for all clients: (module, what is stacked, ``[B, K*C, *positions]``) -> the same shape."""


def _tall(x: Tensor) -> Tensor:
    """Signals ``[B, C, L]`` as images of height one, anything else as it is.

    The same numbers; channels-last kernels exist for images only and are much faster on a CPU.
    """
    return x.unsqueeze(2) if x.dim() == 3 else x


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``F.linear`` of large weights without a gradient, by oneDNN where torch has it.

    MKL, which ``F.linear`` uses, leaves AVX-512 unused on processors of other makes and takes up to twice as long.
    The operator is the one that torch's own compiler puts in the place of ``F.linear``.
    """
    if x.dtype == torch.float32 and x.device.type == "cpu" and torch.backends.mkldnn.is_available():
        pointwise = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
        if pointwise is not None:
            return cast(Tensor, pointwise(x, weight, bias, "none", [], ""))
    return F.linear(x, weight, bias)


class _Stepping(torch.autograd.Function):
    """A linear layer whose weight takes its step of plain SGD as soon as its gradient is known.

    The gradient is added to the weight where it is computed. A large one would otherwise be written out, and read
    again, at the cost of a quarter of the whole step.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, lr: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.weight, ctx.lr = weight, lr  # not saved: it changes in place, which autograd would refuse
        return _product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None, Tensor, None]:
        (g,), (x,) = gradients, ctx.saved_tensors
        to_inputs = _product(g, ctx.weight.T, None) if ctx.needs_input_grad[0] else None
        ctx.weight.addmm_(g.T, x, alpha=-ctx.lr)
        return to_inputs, None, g.sum(0), None


def _linear(m: nn.Linear, here: Stacked, x: Tensor) -> Tensor:
    weight, bias = here.tensors["weight"], here.tensors.get("bias")
    if here.across:
        return torch.bmm(weight, x) if bias is None else torch.baddbmm(bias.mT, weight, x)
    if x.dim() != 2:
        raise Unstackable(f"a linear layer on activations with {x.dim()} axes")
    if here.lr is not None:
        return cast(Tensor, _Stepping.apply(x, weight[0], cast(Tensor, bias).view(-1), here.lr))  # type: ignore[no-untyped-call]
    if here.k == 1:
        return F.linear(x, weight[0], None if bias is None else bias.view(-1))
    rows = x.view(len(x), here.k, -1).transpose(0, 1)
    out = torch.bmm(rows, weight.mT) if bias is None else torch.baddbmm(bias, rows, weight.mT)
    return out.transpose(0, 1).flatten(1)


def _convolution(m: Any, here: Stacked, x: Tensor) -> Tensor:
    weight, bias = here.tensors["weight"], here.tensors.get("bias")
    if x.dim() == 5:
        return F.conv3d(x, weight, bias, m.stride, m.padding, m.dilation, m.groups * here.k)
    stride, padding, dilation = m.stride, m.padding, m.dilation
    if isinstance(m, nn.Conv1d):
        weight, stride, dilation = weight.unsqueeze(2), (1, *stride), (1, *dilation)
        padding = padding if isinstance(padding, str) else (0, *padding)
    return F.conv2d(_channels_last(x), weight, bias, stride, padding, dilation, m.groups * here.k)


def _batch_norm(m: Any, here: Stacked, x: Tensor) -> Tensor:
    t = here.tensors
    if m.training and m.track_running_stats:
        t["num_batches_tracked"].add_(1)
    stored = not m.training or m.track_running_stats
    out = F.batch_norm(
        x.reshape(1, -1, x.shape[2]) if here.across else x,
        t.get("running_mean") if stored else None,
        t.get("running_var") if stored else None,
        t.get("weight"),
        t.get("bias"),
        m.training or m.running_mean is None,
        m.momentum,
        m.eps,
    )
    return out.view(x.shape) if here.across else out


def _instance_norm(m: Any, here: Stacked, x: Tensor) -> Tensor:
    t = here.tensors
    batch = m.training or not m.track_running_stats
    return F.instance_norm(
        x, t.get("running_mean"), t.get("running_var"), t.get("weight"), t.get("bias"), batch, m.momentum, m.eps
    )


def _group_norm(m: nn.GroupNorm, here: Stacked, x: Tensor) -> Tensor:
    return F.group_norm(x, m.num_groups * here.k, here.tensors.get("weight"), here.tensors.get("bias"), m.eps)


def _layer_norm(m: nn.LayerNorm, here: Stacked, x: Tensor) -> Tensor:
    each = x.reshape(len(x), here.k, -1, *x.shape[2:])
    out = F.layer_norm(each, m.normalized_shape, eps=m.eps)
    middle = [1] * (each.dim() - 2 - len(m.normalized_shape))
    weight, bias = here.tensors.get("weight"), here.tensors.get("bias")
    if weight is not None:
        out = out * weight.view(here.k, *middle, *m.normalized_shape)
    if bias is not None:
        out = out + bias.view(here.k, *middle, *m.normalized_shape)
    return out.flatten(1, 2)


def _dropout(m: Any, here: Stacked, x: Tensor) -> Tensor:
    if not m.training or m.p == 0:
        return x
    if m.p == 1:
        return x * 0
    if here.across:
        masks = [x.new_empty(x.shape[2], x.shape[1]).bernoulli_(1 - m.p, generator=draw) for draw in here.noise]
        return x * torch.stack(masks).mT.div(1 - m.p)
    positions = x.shape[2:] if type(m) is nn.Dropout else [1] * (x.dim() - 2)
    shape = (len(x), x.shape[1] // here.k, *positions)
    masks = [x.new_empty(shape).bernoulli_(1 - m.p, generator=draw) for draw in here.noise]
    return x * torch.stack(masks, 1).div_(1 - m.p).flatten(1, 2)


def _same(m: nn.Module, here: Stacked, x: Tensor) -> Tensor:
    return cast(Tensor, m(x))


def _pool(m: nn.Module, here: Stacked, x: Tensor) -> Tensor:
    """Pooling of images, or of signals as images of height one."""
    if isinstance(m, nn.AdaptiveAvgPool1d | nn.AdaptiveMaxPool1d):
        adaptive = F.adaptive_avg_pool2d if isinstance(m, nn.AdaptiveAvgPool1d) else F.adaptive_max_pool2d
        length = m.output_size[0] if isinstance(m.output_size, tuple) else m.output_size
        return cast(Tensor, adaptive(x, (1, cast(int, length))))
    if not isinstance(m, nn.MaxPool1d | nn.AvgPool1d):
        return cast(Tensor, m(x))

    def two(value: Any, first: int) -> tuple[int, int]:
        return first, value[0] if isinstance(value, tuple) else value

    size, stride, padding = two(m.kernel_size, 1), two(m.stride, 1), two(m.padding, 0)
    if isinstance(m, nn.AvgPool1d):
        rest: tuple[Any, ...] = (m.ceil_mode, m.count_include_pad)
        return F.avg_pool2d(x, size, stride, padding, *rest)
    dilation = two(m.dilation, 1)
    return F.max_pool2d(x, size, stride, padding, dilation, m.ceil_mode)


def _flatten(x: Tensor, start_dim: int = 0, end_dim: int = -1) -> Tensor:
    if start_dim != 1 or end_dim not in (-1, x.dim() - 1):
        raise Unstackable(f"flatten from axis {start_dim} to {end_dim}")
    return x.flatten(1)


_ELEMENTWISE = (
    *(nn.Identity, nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish),
    *(nn.Sigmoid, nn.Tanh, nn.Softplus, nn.Hardtanh, nn.Hardswish, nn.Hardsigmoid),
)
_POOLING = (
    *(nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d),
    *(nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d),
    *(nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d),
)

TWINS: dict[type[nn.Module], Twin] = {
    nn.Flatten: lambda m, here, x: _flatten(x, m.start_dim, m.end_dim),
    nn.Linear: _linear,
    nn.LayerNorm: _layer_norm,
    nn.GroupNorm: _group_norm,
    **dict.fromkeys((nn.Conv1d, nn.Conv2d, nn.Conv3d), _convolution),
    **dict.fromkeys((nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, AnyBatchNorm), _batch_norm),
    **dict.fromkeys((nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d, AnyInstanceNorm), _instance_norm),
    **dict.fromkeys((nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d), _dropout),
    **dict.fromkeys(_ELEMENTWISE, _same),
    **dict.fromkeys(_POOLING, _pool),
}


def _mean(x: Tensor, dim: Any = None, keepdim: bool = False) -> Tensor:
    axes = [d % x.dim() for d in (dim if isinstance(dim, tuple | list) else (0 if dim is None else dim,))]
    if min(axes) < 2:
        raise Unstackable(f"mean over axes {axes}, which are not positions")
    return x.mean(axes, keepdim)


def _unsqueeze(x: Tensor, dim: int) -> Tensor:
    if dim < 2:
        raise Unstackable(f"unsqueeze at axis {dim}")
    return x.unsqueeze(dim)


def _reshape(x: Tensor, *shape: Any) -> Tensor:
    wanted = shape[0] if len(shape) == 1 else shape
    if tuple(wanted) != (len(x), -1):
        raise Unstackable(f"a reshape to {list(wanted)} other than [N, -1]")
    return x.flatten(1)


def _relu(x: Tensor, inplace: bool = False) -> Tensor:
    return F.relu(x)


def _size(x: Tensor, dim: int | None = None) -> int:
    if dim != 0:
        raise Unstackable("the size of an axis that is not the batch")
    return len(x)


FUNCTIONS: dict[Any, Callable[..., Any]] = {
    **{f: f for f in (F.gelu, F.silu, torch.sigmoid, torch.tanh)},
    **dict.fromkeys((F.relu, torch.relu), _relu),
    **dict.fromkeys((operator.add, torch.add), torch.add),
    torch.flatten: _flatten,
    torch.mean: _mean,
}
METHODS: dict[str, Callable[..., Any]] = {
    "flatten": _flatten,
    "mean": _mean,
    "relu": _relu,
    "unsqueeze": _unsqueeze,
    "view": _reshape,
    "reshape": _reshape,
    "size": _size,
    "contiguous": Tensor.contiguous,
    "add": torch.add,
}


_TALL: frozenset[Twin] = frozenset({_convolution, _batch_norm, _group_norm, _instance_norm, _same, _pool})
"""Layers that compute the same on signals and on images of height one."""

_FEATURES = (nn.Linear, nn.BatchNorm1d, AnyBatchNorm, nn.Dropout, *_ELEMENTWISE)
_OF_FEATURES = {F.relu, torch.relu, torch.sigmoid, torch.tanh, F.gelu, F.silu, operator.add, torch.add, "relu", "add"}


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return type(m) in TWINS or super().is_leaf_module(m, module_qualified_name)


@dataclass(frozen=True)
class _Layer:
    """A layer's place in the program: where its tensors are and how it is computed."""

    module: nn.Module
    twin: Twin
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
            type(self.layers[n.name].module) in _FEATURES if n.op == "call_module" else n.target in _OF_FEATURES
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
    def draws(self) -> bool:
        """Whether a step needs random numbers."""
        return any(layer.twin is _dropout for layer in self.layers.values())

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
                here = Stacked(k, {n: tensors[key] for n, key in layer.names}, noise, across, rate)
                compute: Callable[..., Any] = partial(layer.twin, layer.module, here)
                if node in late.values():
                    compute = _then_relu(compute)
                steps.append((node, compute, layer.twin in _TALL and not across, node.args, {}))
            else:
                twin = METHODS[node.target] if node.op == "call_method" else FUNCTIONS[node.target]
                steps.append((node, twin, False, node.args, node.kwargs))

        def forward(x: Tensor) -> Tensor:
            values: dict[fx.Node, Any] = {first: x}
            tall: set[fx.Node] = set()  # whose value is a signal as an image
            for node, compute, takes_tall, args, kwargs in steps:
                if takes_tall:
                    (source,) = args
                    if source in tall or values[source].dim() == 3:
                        tall.add(node)
                    values[node] = compute(_tall(values[source]))
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


def _value(of: Any, values: dict[fx.Node, Any]) -> Any:
    if isinstance(of, fx.Node):
        return values[of]
    return tuple(_value(o, values) for o in of) if isinstance(of, tuple | list) else of


def program(model: nn.Module) -> Program:
    """Read a model, in its present training mode, into its stacked twin.

    Raises:
        Unstackable: it has parts that are not known here.

    >>> net = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.ReLU(), nn.Linear(3, 2))
    >>> twin = program(net)
    >>> state = {n: twin.laid(n, torch.stack([v, v])) for n, v in net.state_dict().items()}
    >>> x = torch.randn(5, 4)
    >>> torch.allclose(twin.bind(state, 2)(x.repeat(1, 2)), net(x).repeat(1, 2), atol=1e-6)
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
    if kind not in TWINS:
        raise Unstackable(f"layer {kind.__name__}")
    if len(node.args) != 1 or node.kwargs:
        raise Unstackable(f"{path} is called with more than one argument")
    if getattr(module, "padding_mode", "zeros") != "zeros":
        raise Unstackable(f"{path} pads with {module.padding_mode}")
    if TWINS[kind] is _batch_norm and module.momentum is None:
        raise Unstackable(f"{path} averages cumulatively (momentum=None)")
    if getattr(module, "return_indices", False):
        raise Unstackable(f"{path} returns indices")
    return _Layer(module, TWINS[kind], tuple((n, f"{path}.{n}") for n in module.state_dict()))

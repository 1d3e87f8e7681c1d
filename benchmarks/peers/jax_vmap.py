"""FedBN in JAX on the same workloads: ``python -m benchmarks.peers.jax_vmap RUN THREADS``.

A round is one compiled program: ``vmap`` over the clients of a ``scan`` over their steps. Convolutions are matrix
products of patches, and networks with convolutions take one client after the other (``lax.map``): on a CPU this is 2 to
14 times as fast as JAX's own convolutions, with ``vmap`` or without. It needs jax (``make bench-peers``), which uses
the cores of the process, whatever THREADS is. Bradbury et al., *JAX: composable transformations of Python+NumPy
programs*, 2018, https://github.com/jax-ml/jax
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import fx, nn

from benchmarks.rounds import context_from_arguments, serve
from fedbn.data.batching import batch_sizes
from fedbn.errors import UserError
from fedbn.federation.context import RunContext

try:
    import jax
    import jax.numpy as jnp
    from jax import lax
except ImportError as error:
    raise UserError(f"this benchmark needs jax: run make bench-peers ({error})") from None

State = dict[str, Any]
"""Entries of a model by name, as JAX arrays."""


def apply(graph: fx.Graph, model: nn.Module, state: State, x: Any) -> tuple[Any, State]:
    """Outputs and new running statistics of a traced model in training mode; inputs have their channels last."""
    values: dict[fx.Node, Any] = {}
    statistics: State = {}
    for node in graph.nodes:
        if node.op == "placeholder":
            values[node] = x
        elif node.op == "output":
            return values[node.args[0]], statistics
        elif node.op == "call_module":
            module, path = model.get_submodule(str(node.target)), str(node.target)
            own = {name: state[f"{path}.{name}"] for name in module.state_dict()}
            values[node], new = _layer(module, own, values[node.args[0]])
            statistics |= {f"{path}.{name}": value for name, value in new.items()}
        elif node.target == "flatten":
            values[node] = _flat(values[node.args[0]])
        elif node.target == "contiguous":
            values[node] = values[node.args[0]]
        else:
            raise UserError(f"the JAX benchmark does not support {node.target}")
    raise AssertionError("a graph has an output")


def _layer(module: Any, own: State, x: Any) -> tuple[Any, State]:
    if isinstance(module, nn.Linear):
        return x @ own["weight"].T + own["bias"], {}
    if isinstance(module, nn.Conv1d | nn.Conv2d) and {*module.stride, *module.dilation, module.groups} == {1}:
        return _convolution(own["weight"], x, module.padding) + own["bias"], {}
    if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
        return _batch_norm(module, own, x)
    if isinstance(module, nn.ReLU):
        return jnp.maximum(x, 0), {}
    if isinstance(module, nn.MaxPool1d | nn.MaxPool2d):
        return _max_pool(x, module.kernel_size), {}
    if isinstance(module, nn.AdaptiveAvgPool1d):
        return x.mean(axis=1, keepdims=True), {}
    if isinstance(module, nn.Flatten):
        return _flat(x), {}
    raise UserError(f"the JAX benchmark does not support {module}")


def _flat(x: Any) -> Any:
    return jnp.moveaxis(x, -1, 1).reshape(len(x), -1)


def _convolution(weight: Any, x: Any, padding: tuple[int, ...]) -> Any:
    """A matrix product of patches ``[N, *positions, offsets x channels]`` and weights."""
    kernel = weight.shape[2:]
    x = jnp.pad(x, [(0, 0), *((p, p) for p in padding), (0, 0)])
    sizes = [size - k + 1 for size, k in zip(x.shape[1:-1], kernel, strict=True)]
    shifts = product(*map(range, kernel))
    parts = [x[:, *(slice(i, i + n) for i, n in zip(shift, sizes, strict=True))] for shift in shifts]
    return jnp.concatenate(parts, -1) @ jnp.moveaxis(weight, (0, 1), (-1, -2)).reshape(-1, len(weight))


def _max_pool(x: Any, width: int) -> Any:
    sizes = [size // width for size in x.shape[1:-1]]
    x = x[:, *(slice(width * n) for n in sizes)]
    split = x.reshape(len(x), *(part for n in sizes for part in (n, width)), x.shape[-1])
    return split.max(axis=tuple(range(2, split.ndim - 1, 2)))


def _batch_norm(module: Any, own: State, x: Any) -> tuple[Any, State]:
    axes, count, rate = tuple(range(x.ndim - 1)), x.size // x.shape[-1], module.momentum
    mean, variance = x.mean(axes), x.var(axes)
    scale = own["weight"] * lax.rsqrt(variance + module.eps)
    return x * scale + (own["bias"] - mean * scale), {
        "running_mean": (1 - rate) * own["running_mean"] + rate * lax.stop_gradient(mean),
        "running_var": (1 - rate) * own["running_var"] + rate * count / (count - 1) * lax.stop_gradient(variance),
        "num_batches_tracked": own["num_batches_tracked"] + 1,
    }


def local_training(ctx: RunContext) -> Callable[[State, Any, Any, Any], State]:
    """The local training of one client: (state, examples, targets, rows ``[steps, batch]``) -> new state."""
    model, lr = ctx.load(ctx.initial).train(), ctx.run.plan.lr
    graph = fx.Tracer().trace(model)
    trained = [name for name, _ in model.named_parameters()]

    def loss(parameters: State, state: State, x: Any, y: Any) -> tuple[Any, State]:
        outputs, statistics = apply(graph, model, state | parameters, x)
        return -jnp.take_along_axis(jax.nn.log_softmax(outputs), y[:, None], 1).mean(), statistics

    def train(state: State, x: Any, y: Any, rows: Any) -> State:
        def step(state: State, batch: Any) -> tuple[State, None]:
            parameters = {name: state[name] for name in trained}
            gradients, statistics = jax.grad(loss, has_aux=True)(parameters, state, x[batch], y[batch])
            return state | statistics | {n: p - lr * gradients[n] for n, p in parameters.items()}, None

        return lax.scan(step, state, rows)[0]

    return train


def rounds(ctx: RunContext, orders: Callable[[int], np.ndarray]) -> Iterator[State]:
    """The states of all clients ``[K, *shape]`` after each round; ``orders`` shuffles one client's rows."""
    users, plan, keys = ctx.trainers, ctx.run.plan, ctx.ownership
    data = [ctx.training_data(user) for user in users]
    if len({len(part) for part in data}) > 1 or len(set(sizes := batch_sizes(len(data[0]), plan.batch_size))) > 1:
        raise UserError("the JAX benchmark needs clients with the same number of whole batches")
    x, y = (jnp.asarray(torch.stack(tensors).numpy()) for tensors in ([p.x for p in data], [p.y for p in data]))
    x = jnp.moveaxis(x, 2, -1) if x.ndim > 3 else x
    convolves = any(isinstance(m, nn.Conv1d | nn.Conv2d) for m in ctx.scratch.modules())
    train = local_training(ctx)

    @jax.jit
    def round(shared: State, local: State, rows: Any) -> tuple[State, State, State]:
        def client(inputs: Any) -> State:
            own, *examples = inputs
            return train(shared | own, *examples)

        inputs = (local, x, y, rows)
        trained = lax.map(client, inputs) if convolves else jax.vmap(client)(inputs)
        return {n: trained[n].mean(0) for n in keys.travels}, {n: trained[n] for n in keys.retained}, trained

    start = {name: jnp.asarray(value.numpy()) for name, value in ctx.initial.items()}
    shared = {n: start[n] for n in keys.travels}
    local = {n: jnp.stack([start[n]] * len(users)) for n in keys.retained}
    while True:
        rows = np.stack([orders(len(data[0])) for _ in users]).reshape(len(users), len(sizes), -1)
        shared, local, trained = round(shared, local, jnp.asarray(rows))
        yield jax.block_until_ready(trained)


if __name__ == "__main__":
    serve(partial(next, rounds(context_from_arguments()[0], np.random.default_rng(0).permutation)))

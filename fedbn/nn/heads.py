"""The head of a network: the last parameterized layer before the logits, found from the computation.

Registration order is not the order of computation: a classifier may be registered first, and a network may have layers
that do not contribute to its output. The head is read off the graph that autograd records in a forward pass. Starting
at the logits, the walk ends at each operation between activations and parameters, such as a matrix product. Scales and
shifts of single channels are part of the head if they follow it; normalization layers are passed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize

from fedbn.nn.roles import is_norm

ELEMENTWISE = (
    "Add",
    "Sub",
    "Rsub",
    "Mul",
    "Div",
    "Addcmul",
    "Addcdiv",
    "Lerp",
    "Pow",
    "Where",
    "PreluKernel",
)
"""Names of operations of autograd that combine activations and parameters element by element."""


@dataclass(frozen=True)
class HeadLayers:
    """The layers that compute the logits.

    Attributes:
        paths: their paths, and the names of parameters that belong to no layer, in registration order.
        parallel: whether several layers compute the logits side by side.
        tied: other names of the parameters in ``paths``.
    """

    paths: tuple[str, ...]
    parallel: bool
    tied: tuple[str, ...]


def layer_path(model: nn.Module, name: str) -> str:
    """Path of the layer that owns a parameter, or the parameter's name if the owner has further layers with parameters.

    >>> layer_path(nn.Sequential(nn.Linear(2, 2)), "0.weight")
    '0'
    """
    path = name.partition(".parametrizations.")[0] if ".parametrizations." in name else name.rpartition(".")[0]
    layer = model.get_submodule(path)
    inner = [
        m for key, m in layer.named_children() if not (key == "parametrizations" and parametrize.is_parametrized(layer))
    ]
    return name if not path or any(True for m in inner for _ in m.parameters()) else path


def _children(node: Any) -> list[Any]:
    return [child for child, _ in node.next_functions if child is not None]


def _reach(node: Any) -> Iterator[Any]:
    """The node and all nodes below it, those farther from the output first."""
    seen, stack = {node}, [(node, iter(_children(node)))]
    while stack:
        current, rest = stack[-1]
        child = next((c for c in rest if c not in seen), None)
        if child is None:
            stack.pop()
            yield current
        else:
            seen.add(child)
            stack.append((child, iter(_children(child))))


def find_head(model: nn.Module, output: Tensor, activations: set[Any]) -> HeadLayers | None:
    """The head of a network, from the graph of one forward pass in which all parameters required gradients.

    Args:
        model: the network.
        output: its logits.
        activations: graph nodes of the input and of outputs of layers.

    Returns:
        None if no parameter has been used in computing the logits.
    """
    if output.grad_fn is None:
        return None
    names: dict[int, list[str]] = {}
    modules = dict(model.named_modules(remove_duplicate=False))
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    norms = {id(p) for m in modules.values() if is_norm(m) for p in m.parameters(recurse=False)}
    depends: dict[Any, bool] = {}
    for node in _reach(output.grad_fn):
        is_activation = node in activations or node.name().startswith("Embedding")
        depends[node] = is_activation or any(depends[child] for child in _children(node))

    layers: list[Tensor] = []
    operations: set[frozenset[str]] = set()
    others: list[Tensor] = []
    seen, stack = {output.grad_fn}, [output.grad_fn]
    while stack:
        node = stack.pop()
        weights = [c for c in _children(node) if not depends[c]]
        used = [n.variable for w in weights for n in _reach(w) if hasattr(n, "variable")]
        used = [p for p in used if id(p) in names and id(p) not in norms]
        kind = node.name().partition("Backward")[0]
        is_matrix = any(sum(size > 1 for size in p.shape) > 1 for p in used)
        if used and "Norm" not in kind and (is_matrix or kind not in ELEMENTWISE):
            layers += used
            operations.add(frozenset(layer_path(model, names[id(p)][0]) for p in used))
            continue
        others += used
        fresh = [c for c in _children(node) if depends[c] and c not in seen]
        seen.update(fresh)
        stack += fresh
    if not layers:
        return None
    chosen = {layer_path(model, name) for p in (*layers, *others) for name in names[id(p)]}
    order = {name: i for i, name in enumerate(name for several in names.values() for name in several)}
    first = {path: min(i for name, i in order.items() if layer_path(model, name) == path) for path in chosen}
    tied = tuple(name for p in layers for name in names[id(p)][1:])
    return HeadLayers(tuple(sorted(chosen, key=first.__getitem__)), len(operations) > 1, tied)

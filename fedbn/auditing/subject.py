"""The model under audit, and what one forward and backward pass shows of it."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

from fedbn.nn.hooks import inputs_of
from fedbn.nn.roles import Role, State, head, is_norm, keeps_statistics, norm_layers
from fedbn.strategies.base import NormStrategy
from fedbn.strategies.ownership import Ownership

EXAMPLES = 2
"""Examples of the measuring batch: the fewest for which no BatchNorm raises."""


@dataclass(frozen=True)
class Measured:
    """What a small batch showed.

    Attributes:
        values: by layer, values that one example adds to each channel (BatchNorm) or has in each group
            (GroupNorm).
        order: layers in the order in which they ran.
        failure: why nothing could be measured.
    """

    values: dict[str, int] = field(default_factory=dict)
    order: tuple[str, ...] = ()
    failure: str | None = None


def measure(model: nn.Module, shape: tuple[int, ...]) -> Measured:
    """Run `EXAMPLES` zeros of ``shape`` through a copy in training mode and watch its normalization layers.

    >>> net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    >>> measure(net, (3, 5, 5)).values
    {'1': 25}
    """
    values: dict[str, int] = {}
    order: list[str] = []

    def see(path: str, x: Tensor) -> None:
        order.append(path)
        layer = watched[path]
        if isinstance(layer, (_BatchNorm, nn.GroupNorm)) and x.dim() > 1:
            sets = layer.num_groups if isinstance(layer, nn.GroupNorm) else x.shape[1]
            seen = x.numel() // (EXAMPLES * sets)
            values[path] = min(seen, values.get(path, seen))

    try:
        twin = copy.deepcopy(model).train()
        watched = norm_layers(twin)
        if last := head(twin):
            watched[last] = twin.get_submodule(last)
        weight = next((p for p in twin.parameters() if p.is_floating_point()), torch.zeros(()))
        batch = torch.zeros(EXAMPLES, *shape, dtype=weight.dtype, device=weight.device)
        with torch.random.fork_rng(devices=[]), torch.no_grad(), inputs_of(watched, see):
            twin(batch)
    except Exception as error:  # a user's model may raise anything
        return Measured(failure=f"{type(error).__name__}: {error}".splitlines()[0])
    return Measured(values, tuple(dict.fromkeys(order)))


class Subject:
    """A model as lints see it: to be read, never written."""

    def __init__(
        self,
        model: nn.Module,
        state: State,
        owned: Ownership,
        strategy: NormStrategy,
        batch_size: int,
        shape: tuple[int, ...] | None,
    ) -> None:
        self.model, self.state, self.owned, self.strategy = model, state, owned, strategy
        self.batch_size, self.shape = batch_size, shape
        modules = dict(model.named_modules(remove_duplicate=False))
        self.lazy = [k for k, v in state.items() if is_lazy(v)]
        self.norms = norm_layers(model)
        self.batch_norms = {p: m for p, m in self.norms.items() if isinstance(m, _BatchNorm)}
        self.norm_keys = [k for k in state if is_norm(modules[k.rpartition(".")[0]])]
        self.pairs = [
            (f"{path}.{a}".lstrip("."), left, f"{path}.{b}".lstrip("."), right)
            for path, sequence in model.named_modules()
            if isinstance(sequence, nn.Sequential)
            for (a, left), (b, right) in zip(
                sequence.named_children(), list(sequence.named_children())[1:], strict=False
            )
        ]
        self.measured = measure(model, shape) if shape is not None and not self.lazy else Measured()

    def keys(self, role: Role) -> list[str]:
        """Entries of one role."""
        return [k for k, r in self.owned.roles.items() if r is role]

    def size(self, keys: list[str]) -> int:
        """Bytes of entries."""
        return sum(self.owned.sizes[k] for k in keys)

    def readable(self, layer: nn.Module) -> bool:
        """Whether a layer's statistics exist and have values."""
        tensors = [t for _, t in layer.named_buffers(recurse=False)]
        return keeps_statistics(layer) and not any(is_lazy(t) or t.is_meta for t in tensors)

"""The model under audit, and measurements from one forward pass."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

from fedbn.models.inspection import EXAMPLES, example_batch
from fedbn.nn.hooks import capture_inputs
from fedbn.nn.plain import copy_model
from fedbn.nn.roles import Role, State, head, is_norm, keeps_statistics, norm_layers
from fedbn.strategies.base import NormStrategy
from fedbn.strategies.ownership import Ownership


@dataclass(frozen=True)
class Measurement:
    """Result of running a small batch.

    Attributes:
        values: layer -> number of values of one example per channel (BatchNorm) or per group (GroupNorm).
        order: layers in order of execution.
        failure: error message if the model could not run.
    """

    values: dict[str, int] = field(default_factory=dict)
    order: tuple[str, ...] = ()
    failure: str | None = None


def measure(model: nn.Module, shape: tuple[int, ...]) -> Measurement:
    """Run `EXAMPLES` zeros of ``shape`` through a copy in training mode and record its normalization layers.

    >>> net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    >>> measure(net, (3, 5, 5)).values
    {'1': 25}
    """
    values: dict[str, int] = {}
    order: list[str] = []

    def record(path: str, x: Tensor) -> None:
        order.append(path)
        layer = layers[path]
        if isinstance(layer, (_BatchNorm, nn.GroupNorm)) and x.dim() > 1:
            groups = layer.num_groups if isinstance(layer, nn.GroupNorm) else x.shape[1]
            num_values = x.numel() // (EXAMPLES * groups)
            values[path] = min(num_values, values.get(path, num_values))

    try:
        model = copy_model(model).train()
        modules = dict(model.named_modules())
        layers = norm_layers(model) | {path: modules[path] for path in head(model) if path in modules}
        batch = example_batch(model, shape)
        with torch.random.fork_rng(devices=[]), torch.no_grad(), capture_inputs(layers, record):
            model(batch)
    except Exception as error:  # a user's model may raise any exception
        return Measurement(failure=f"{type(error).__name__}: {error}".splitlines()[0])
    return Measurement(values, tuple(dict.fromkeys(order)))


class Subject:
    """Input of the lints: a model, its ownership table and measurements, all read-only."""

    def __init__(
        self,
        model: nn.Module,
        state: State,
        ownership: Ownership,
        strategy: NormStrategy,
        batch_size: int,
        shape: tuple[int, ...] | None,
        data: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        self.model, self.state, self.ownership, self.strategy = model, state, ownership, strategy
        self.batch_size, self.shape, self.data = batch_size, shape, data
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
        self.measured = measure(model, shape) if shape is not None and not self.lazy else Measurement()

    def keys(self, role: Role) -> list[str]:
        """Keys of the entries with a role."""
        return [k for k, r in self.ownership.roles.items() if r is role]

    def size(self, keys: list[str]) -> int:
        """Total size of entries in bytes."""
        return sum(self.ownership.sizes[k] for k in keys)

    def readable(self, layer: nn.Module) -> bool:
        """Whether a layer has running statistics with values."""
        tensors = [t for _, t in layer.named_buffers(recurse=False)]
        return keeps_statistics(layer) and not any(is_lazy(t) or t.is_meta for t in tensors)

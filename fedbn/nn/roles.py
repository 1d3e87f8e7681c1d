"""Roles of the entries of a model's state, derived from the type of the owning module.

Names are ignored: ``'bn' in key`` misses ``downsample.1`` in every torchvision ResNet and all of
MobileNet, DenseNet and VGG-BN.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import StrEnum

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

from fedbn.errors import UserError, unknown

State = dict[str, Tensor]
"""A model's state or a part of it: entry name -> tensor."""


class Role(StrEnum):
    """Role of a state entry.

    Attributes:
        BODY: weights of feature-extracting layers.
        HEAD: weights of the last parameterized layer before the logits, the classifier (`head`).
        AFFINE: scale and shift (gamma, beta) of a layer with batch statistics (`uses_batch_statistics`).
        SAMPLE_AFFINE: scale and shift of a layer that normalizes each sample by itself, such as LayerNorm.
        GATE: weights by which a normalization layer mixes statistics; the layer lists their names in ``gates``.
        STATISTICS: running moments of a normalization layer.
        COUNTER: an integer that counts batches; it is neither averaged nor sent.
    """

    BODY = "body"
    HEAD = "head"
    AFFINE = "affine"
    SAMPLE_AFFINE = "sample_affine"
    GATE = "gate"
    STATISTICS = "statistics"
    COUNTER = "counter"


NORM_TYPES: tuple[type[nn.Module], ...] = (
    _NormBase,  # BatchNorm, InstanceNorm, SyncBatchNorm and their lazy forms
    nn.GroupNorm,
    nn.LayerNorm,
    nn.RMSNorm,
    nn.LocalResponseNorm,
)


def is_norm(module: nn.Module) -> bool:
    """Whether a module normalizes activations: PyTorch's types, their subclasses, or ``normalizes = True``."""
    return isinstance(module, NORM_TYPES) or getattr(module, "normalizes", False) is True


def keeps_statistics(module: nn.Module) -> bool:
    """Whether a module has a running mean and variance."""
    return is_norm(module) and isinstance(getattr(module, "running_mean", None), Tensor)


def uses_batch_statistics(module: nn.Module) -> bool:
    """Whether a module normalizes by statistics of batches, running or not: BN of any kind, unlike LayerNorm."""
    buffers = module.buffers(recurse=False)
    return isinstance(module, _BatchNorm) or (is_norm(module) and any(b.is_floating_point() for b in buffers))


def batch_norm_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The layers with batch statistics by path, in registration order."""
    return {path: m for path, m in model.named_modules() if uses_batch_statistics(m)}


def norm_layers(model: nn.Module) -> dict[str, nn.Module]:
    """All normalization layers by path, in registration order."""
    return {path: m for path, m in model.named_modules() if is_norm(m)}


def statistics_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The layers with running statistics by path, in registration order."""
    return {path: m for path, m in model.named_modules() if keeps_statistics(m)}


HEAD_PATHS = "fedbn_head"
"""Attribute of a model with the paths of its head, set by `set_head`."""


CLASSES = "fedbn_classes"
"""Attribute of a built model with its number of classes."""


def set_head(model: nn.Module, paths: Iterable[str]) -> None:
    """Set the layers (or single parameters) that form the head of a model.

    Raises:
        UserError: a path that matches no entry of the model.

    >>> net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    >>> set_head(net, ["0", "2"]); head(net)
    ('0', '2')
    """
    chosen = tuple(paths)
    require_paths(model, chosen, "head")
    setattr(model, HEAD_PATHS, chosen)


def has_head(model: nn.Module) -> bool:
    """Whether `set_head` has been called."""
    return hasattr(model, HEAD_PATHS)


def head(model: nn.Module) -> tuple[str, ...]:
    """Paths of the layers that form the classifier.

    `fedbn.models.build` sets them: by default the last layer in the order of computation. For other models it is the
    last registered linear or convolutional layer.
    """
    chosen: tuple[str, ...] | None = getattr(model, HEAD_PATHS, None)
    if chosen is not None:
        return chosen
    weighted = [p for p, m in model.named_modules() if isinstance(m, (nn.Linear, nn.modules.conv._ConvNd))]
    return tuple(weighted[-1:])


def head_layer(model: nn.Module) -> tuple[str, nn.Module | None]:
    """Path and module of the classifier if it is a single layer; an empty path and None otherwise."""
    paths = head(model)
    layer = dict(model.named_modules()).get(paths[0]) if len(paths) == 1 else None
    return (paths[0], layer) if layer is not None else ("", None)


def is_below(name: str, paths: Iterable[str]) -> bool:
    """Whether an entry is one of ``paths`` or belongs to a module at or below one of them.

    >>> is_below("head.0.weight", ["head"]), is_below("head2.weight", ["head"])
    (True, False)
    """
    return any(not path or name == path or name.startswith(f"{path}.") for path in paths)


def require_paths(model: nn.Module, paths: Iterable[str], what: str) -> None:
    """Raise unless every path matches an entry of the model's state."""
    names = list(model.state_dict(keep_vars=True))
    for path in paths:
        if not any(is_below(name, [path]) for name in names):
            layers = dict.fromkeys(name.rpartition(".")[0] or name for name in names)
            raise unknown(f"layer for {what}", path, layers)


def roles(model: nn.Module) -> dict[str, Role]:
    """Role of every entry of ``model.state_dict()``, in the same order.

    Raises:
        UserError: an entry is neither a parameter nor a buffer of a module.

    >>> net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))
    >>> {str(r) for r in roles(net).values()} == {"body", "affine", "statistics", "counter", "head"}
    True
    """
    classifier = head(model)
    table: dict[str, Role] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        norm = is_norm(module)
        entries = [
            *((n, p, False) for n, p in module.named_parameters(recurse=False, remove_duplicate=False)),
            *((n, b, True) for n, b in module.named_buffers(recurse=False, remove_duplicate=False)),
        ]
        for name, tensor, buffer in entries:
            if not tensor.is_floating_point() and not tensor.is_complex():
                role = Role.COUNTER
            elif buffer and norm:
                role = Role.STATISTICS
            elif norm and name in getattr(module, "gates", ()):
                role = Role.GATE
            elif norm:
                role = Role.AFFINE if uses_batch_statistics(module) else Role.SAMPLE_AFFINE
            else:
                role = Role.HEAD if is_below(f"{path}.{name}".lstrip("."), classifier) else Role.BODY
            table[f"{path}.{name}" if path else name] = role
    if foreign := [k for k in model.state_dict() if k not in table]:
        raise UserError(
            f"state entry {foreign[0]!r} of {type(model).__name__} is not a parameter or buffer of a module (extra "
            "state, or a hook that renames entries), so it cannot be averaged; remove it from state_dict()"
        )
    return {k: table[k] for k in model.state_dict()}


def split(state: State, keys: set[str]) -> tuple[State, State]:
    """Split ``state`` into the entries in ``keys`` and the rest; `combine` is the inverse."""
    return {k: v for k, v in state.items() if k in keys}, {k: v for k, v in state.items() if k not in keys}


def combine(order: dict[str, Role], *parts: State) -> State:
    """Merge disjoint parts into one state in the order of ``order``.

    Raises:
        KeyError: an entry is missing, unknown or duplicated, because states are never loaded partially.
    """
    merged: State = {}
    for part in parts:
        if duplicates := merged.keys() & part.keys():
            raise KeyError(f"duplicate entries: {sorted(duplicates)}")
        merged |= part
    if merged.keys() != order.keys():
        raise KeyError(
            f"missing {sorted(order.keys() - merged.keys())}, unknown {sorted(merged.keys() - order.keys())}"
        )
    return {k: merged[k] for k in order}


def clone(state: State) -> State:
    """Detached copies of all tensors."""
    return {k: v.detach().clone() for k, v in state.items()}


def with_prefix(state: State, prefix: str) -> State:
    """Entries whose names start with ``prefix``, with the prefix removed.

    >>> import torch
    >>> with_prefix({"a/w": torch.zeros(1), "b/w": torch.ones(1)}, "a/")
    {'w': tensor([0.])}
    """
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}

"""Convert the normalization layers of any model, keeping names, affine parameters and statistics."""

from __future__ import annotations

import importlib
import inspect
import math
import pkgutil
from collections.abc import Callable
from functools import cache, partial
from typing import cast

import torch
from torch import Tensor, nn

from fedbn.errors import UserError, unknown
from fedbn.nn.roles import (
    batch_norm_layers,
    head,
    is_norm,
    keeps_statistics,
    norm_layers,
    statistics_layers,
    uses_batch_statistics,
)


def channels_of(layer: nn.Module) -> int:
    """Number of channels of a normalization layer."""
    for attribute in ("num_features", "num_channels"):
        if isinstance(c := getattr(layer, attribute, None), int):
            return c
    raise UserError(
        f"cannot convert {type(layer).__name__}: its number of channels (axis 1) is unknown; "
        "give it an attribute num_features, or replace it in the model"
    )


def groups_for(channels: int, *, groups: int | None = None, per_group: int | None = None) -> int:
    """Largest number of groups that divides ``channels`` and does not exceed the requested number.

    The common ``GroupNorm(min(32, C), C)`` raises at C=48 and is InstanceNorm for C <= 32.

    >>> groups_for(48, groups=32), groups_for(64, groups=8), groups_for(64, per_group=16)
    (24, 8, 4)

    Raises:
        UserError: ``groups`` or ``per_group`` is below one.
    """
    if groups is not None and groups < 1:
        raise UserError(f"groupnorm: groups={groups} is impossible; give at least 1")
    if per_group is not None and not per_group >= 1:
        raise UserError(f"groupnorm: channels={per_group} per group is impossible; give at least 1")
    limit = groups if groups is not None else max(1, channels // (per_group or 1))
    return max(g for g in range(1, channels + 1) if channels % g == 0 and g <= limit)


def replace_norms(
    model: nn.Module,
    make: Callable[[str, nn.Module], nn.Module | None],
    which: Callable[[nn.Module], bool] = is_norm,
) -> nn.Module:
    """Replace every normalization layer, or those of ``which``, by ``make(path, layer)`` (None: keep), in place.

    Affine parameters, running statistics and the batch counter are copied where both layers have them in the same
    shape. State names do not change.
    """
    replacements: dict[int, nn.Module | None] = {}
    layers = [(path, m) for path, m in model.named_modules(remove_duplicate=False) if which(m)]
    for path, layer in layers:
        new = replacements[id(layer)] if id(layer) in replacements else make(path, layer)
        replacements[id(layer)] = new
        if new is None:
            continue
        reference = next((t for m in (layer, model) for t in m.state_dict().values() if t.is_floating_point()), None)
        if reference is not None:
            new.to(reference.device, reference.dtype)
        _copy_state(new, layer)
        parent, _, leaf = path.rpartition(".")
        if not path:
            raise UserError("the model itself is a normalization layer: wrap it, e.g. nn.Sequential(layer)")
        setattr(model.get_submodule(parent), leaf, new)
    return model


def _copy_state(new: nn.Module, old: nn.Module) -> None:
    names = ["weight", "bias"]
    if keeps_statistics(old) and keeps_statistics(new):
        names += ["running_mean", "running_var", "num_batches_tracked"]
    for name in names:
        source, target = getattr(old, name, None), getattr(new, name, None)
        if isinstance(source, Tensor) and isinstance(target, Tensor) and source.shape == target.shape:
            with torch.no_grad():
                target.copy_(source)
    new.train(old.training)


def converted(model: nn.Module, kind: str) -> Callable[[nn.Module], bool]:
    """Which layers `convert` replaces: those with batch statistics; in a model without any, every normalization layer.

    Raises:
        UserError: the model has no normalization layer.
    """
    require_norms(model, f"conversion to {kind}")
    return uses_batch_statistics if batch_norm_layers(model) else is_norm


def convert_norms(model: nn.Module, cls: type[nn.Module], kind: str, **options: object) -> nn.Module:
    """Replace the layers of `converted` by ``cls(channels, eps=, momentum=, affine=, **options)``, in place.

    Values of ``eps``, ``momentum`` and ``affine`` that ``options`` does not set are inherited from the replaced layer,
    if ``cls`` accepts them.

    Raises:
        UserError: the model has no normalization layer.
    """
    which = converted(model, kind)
    parameters = inspect.signature(cls).parameters
    accepts_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())

    def make(path: str, layer: nn.Module) -> nn.Module:
        inherited = {
            "eps": getattr(layer, "eps", None) or 1e-5,
            "momentum": getattr(layer, "momentum", 0.1),
            "affine": getattr(layer, "weight", None) is not None,
        }
        accepted = {k: v for k, v in inherited.items() if accepts_any or k in parameters}
        return cls(channels_of(layer), **accepted | options)

    return replace_norms(model, make, which)


def _options(function: Callable[..., object]) -> list[str]:
    """Keyword-only parameters of a function; for a partial of `convert_norms`, those of its layer class."""
    target = function.keywords["cls"] if isinstance(function, partial) else function
    return [name for name, p in inspect.signature(target).parameters.items() if p.kind is p.KEYWORD_ONLY]


@cache
def kinds() -> dict[str, Callable[..., nn.Module]]:
    """The kinds of normalization that `convert` supports: ``convert`` of every module in ``fedbn.norms``, by file name.

    >>> {"batch", "group", "batch-renorm", "weight-norm"} <= set(kinds())
    True
    """
    package = importlib.import_module("fedbn.norms")
    modules = {m.name: importlib.import_module(f"fedbn.norms.{m.name}") for m in pkgutil.iter_modules(package.__path__)}
    return {name.replace("_", "-"): m.convert for name, m in modules.items() if hasattr(m, "convert")}


def convert(model: nn.Module, kind: str, **options: object) -> nn.Module:
    """Convert the layers of ``model`` with batch statistics to ``kind``, in place, and return the model.

    Other normalization layers, such as LayerNorm, stay; in a model without BN they are converted if they have channels.
    Names in the state dict do not change, and entries that both layers have are copied. So the weights of a BN network
    load into its GroupNorm version and back, and BN becomes BatchRenorm with its statistics. Kinds that normalize
    weights or features instead (``weight-norm``, ``weight-standardization``, ``fedwon``, ``feature-norm``), and
    ``none``, remove all normalization layers.

    Args:
        model: any module, including nested layers.
        kind: the name of a module in ``fedbn.norms``, with hyphens for underscores.
        **options: options of the kind, for example ``groups`` for ``group``.

    Raises:
        UserError: unknown kind or option, or the model has no normalization layer.

    >>> net = nn.Sequential(nn.Conv2d(3, 48, 1), nn.BatchNorm2d(48))
    >>> convert(net, "group", groups=32)[1].num_groups
    24
    """
    known = kinds()
    if kind not in known:
        raise unknown("kind of normalization", kind, known)
    allowed = _options(known[kind])
    for name in options:
        if name not in allowed:
            if not allowed:
                raise UserError(f"{kind!r} has no options, so {name!r} cannot be set")
            raise unknown(f"option of {kind!r}", name, allowed)
    return known[kind](model, **options)


def remove_norms(model: nn.Module) -> nn.Module:
    """Replace every normalization layer by the identity, in place."""

    def identity(_path: str, _layer: nn.Module) -> nn.Module:
        layer = nn.Identity()
        # PyTorch's transformer layers use a fused kernel, with layer normalization, if both of their normalization
        # layers have the same eps. NaN equals nothing, so that they call the layers.
        layer.eps = math.nan  # type: ignore[assignment]
        return layer

    return replace_norms(model, identity)


def drop_norms(model: nn.Module) -> nn.Module:
    """Remove every normalization layer, in place, and add the missing biases.

    A convolution before BN usually has no bias because BN shifts its output. Each layer without a bias, except the
    classifier, gets one that starts at zero.
    """
    if norm_layers(model):
        remove_norms(model)
        last = head(model)
        for path, layer in weighted_layers(model).items():
            if layer.bias is None and path not in last:
                layer.bias = nn.Parameter(layer.weight.new_zeros(len(layer.weight)))
    return model


def weighted_layers(model: nn.Module) -> dict[str, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d]:
    """Linear layers and convolutions by path; axis 0 of their weight is the output."""
    types = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    return {p: cast(nn.Linear, m) for p, m in model.named_modules() if isinstance(m, types)}


FEDAVG = "compare global-naive (FedAvg), which trains any network as it is"
"""Advice for a model that a strategy does not support."""


def require_norms(model: nn.Module, what: str) -> None:
    """Raise unless the model has a normalization layer."""
    if not norm_layers(model):
        raise UserError(
            f"{what} needs normalization layers and {type(model).__name__} has none: choose a model with BatchNorm, or "
            f"{FEDAVG}"
        )


def require_batch_norm(model: nn.Module, what: str) -> None:
    """Raise unless the model has a layer with batch statistics."""
    if not batch_norm_layers(model):
        raise UserError(
            f"{what} replaces layers with batch statistics and {type(model).__name__} has none: choose a model with "
            f"BatchNorm, or {FEDAVG}"
        )


def require_statistics(model: nn.Module, what: str, advice: str = "") -> None:
    """Raise unless the model has a layer with running statistics."""
    if not statistics_layers(model):
        raise UserError(
            f"{what} works on running statistics and {type(model).__name__} has no layer that keeps any: choose a "
            f"model with BatchNorm (track_running_stats=True){advice}"
        )

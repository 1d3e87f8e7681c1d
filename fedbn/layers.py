"""Exchange the normalisation layers of any model, keeping names and affine parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from fedbn.errors import UserError
from fedbn.roles import is_norm, norm_layers, statistics_layers

Kind = Literal["batch", "group", "layer", "instance", "none"]


class AnyInstanceNorm(_InstanceNorm):
    """Instance normalisation of ``[N, C, *positions]``, whatever the number of position axes.

    Without positions (``[N, C]``) a sample has one value a channel and nothing to normalise by: refused.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Normalised activations, of the input's shape."""
        if input.dim() < 3:
            raise UserError(
                f"instance normalisation needs [N, C, positions], got {list(input.shape)}: this model normalises "
                "after a linear layer; choose groupnorm or layernorm"
            )
        return self._apply_instance_norm(input)


class AnyBatchNorm(_BatchNorm):
    """Batch normalisation of ``[N, C, *positions]``, whatever the number of position axes."""

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"expected [N, C, *positions], got {list(input.shape)}")


def channels_of(layer: nn.Module) -> int:
    """Number of channels a normalisation layer works on."""
    for attribute in ("num_features", "num_channels"):
        if isinstance(c := getattr(layer, attribute, None), int):
            return c
    raise UserError(
        f"cannot exchange {type(layer).__name__}: it does not say how many channels (axis 1) it normalises; "
        "give it num_features, or replace it in the model"
    )


def groups_for(channels: int, *, groups: int | None = None, per_group: int | None = None) -> int:
    """The number of groups that divides ``channels`` and comes closest to the wish without exceeding it.

    ``GroupNorm(min(32, C), C)``, common elsewhere, raises at C=48 and is InstanceNorm for C <= 32.

    >>> groups_for(48, groups=32), groups_for(64, groups=8), groups_for(64, per_group=16)
    (24, 8, 4)

    Raises:
        UserError: a wish below one.
    """
    if groups is not None and groups < 1:
        raise UserError(f"groupnorm: groups={groups} is impossible; give at least 1")
    if per_group is not None and not per_group >= 1:
        raise UserError(f"groupnorm: channels={per_group} per group is impossible; give at least 1")
    wish = groups if groups is not None else max(1, channels // (per_group or 1))
    return max(g for g in range(1, channels + 1) if channels % g == 0 and g <= wish)


def make_norm(
    kind: Kind,
    channels: int,
    *,
    eps: float,
    affine: bool,
    groups: int | None = None,
    per_group: int | None = None,
) -> nn.Module:
    """A normalisation layer for ``channels`` channels at any number of position axes."""
    match kind:
        case "batch":
            return AnyBatchNorm(channels, eps=eps, affine=affine)
        case "group":
            return nn.GroupNorm(groups_for(channels, groups=groups, per_group=per_group), channels, eps, affine)
        case "layer":
            return nn.GroupNorm(1, channels, eps, affine)
        case "instance":
            return AnyInstanceNorm(channels, eps=eps, affine=affine)
        case "none":
            return nn.Identity()


def replace_norms(model: nn.Module, make: Callable[[str, nn.Module], nn.Module | None]) -> nn.Module:
    """Put ``make(path, layer)`` in the place of every normalisation layer (None: leave it), in place.

    Affine parameters are copied where the shapes allow, so state names stay as they were.
    """
    made: dict[int, nn.Module | None] = {}
    layers = [(path, m) for path, m in model.named_modules(remove_duplicate=False) if is_norm(m)]
    for path, layer in layers:
        new = made[id(layer)] if id(layer) in made else make(path, layer)
        made[id(layer)] = new
        if new is None:
            continue
        for name, old in layer.named_parameters(recurse=False):
            target = getattr(new, name, None)
            if isinstance(target, Tensor) and target.shape == old.shape:
                with torch.no_grad():
                    target.copy_(old)
        new.train(layer.training)
        parent, _, leaf = path.rpartition(".")
        if not path:
            raise UserError("the model itself is a normalisation layer: wrap it, e.g. nn.Sequential(layer)")
        setattr(model.get_submodule(parent), leaf, new)
    return model


def convert(model: nn.Module, kind: Kind, *, groups: int | None = None, per_group: int | None = None) -> nn.Module:
    """Turn every normalisation layer of ``model`` into ``kind``, in place, and return the model.

    Names in the state dict stay, and affine parameters are copied, so weights of a BN network load into its
    GroupNorm twin and back (running statistics excepted).

    Args:
        model: any module; nested layers included.
        kind: ``batch``, ``group``, ``layer`` (all of a sample: GroupNorm with one group), ``instance`` or ``none``.
        groups: for ``group``, the number of groups wished; the largest divisor of the channels not above it is used.
        per_group: for ``group``, channels per group instead.

    Raises:
        UserError: the model has no normalisation layer.

    >>> net = nn.Sequential(nn.Conv2d(3, 48, 1), nn.BatchNorm2d(48))
    >>> convert(net, "group", groups=32)[1].num_groups
    24
    """
    require_norms(model, f"conversion to {kind}")

    def make(path: str, layer: nn.Module) -> nn.Module:
        return make_norm(
            kind,
            channels_of(layer),
            eps=float(getattr(layer, "eps", 1e-5)),
            affine=getattr(layer, "weight", None) is not None,
            groups=groups,
            per_group=per_group,
        )

    return replace_norms(model, make)


def require_norms(model: nn.Module, what: str) -> None:
    """Raise unless the model has a normalisation layer."""
    if not norm_layers(model):
        raise UserError(
            f"{what} needs normalisation layers and {type(model).__name__} has none: choose a model with BatchNorm, "
            "or compare strategies that need none (nonorm, local, centralised)"
        )


def require_statistics(model: nn.Module, what: str) -> None:
    """Raise unless the model has a layer with running statistics."""
    if not statistics_layers(model):
        raise UserError(
            f"{what} works on running statistics and {type(model).__name__} has no layer that keeps any: choose a "
            "model with BatchNorm (track_running_stats=True)"
        )


@contextmanager
def inputs_of(layers: dict[str, nn.Module], see: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Call ``see(path, input)`` whenever one of ``layers`` is about to run."""

    def hook(path: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda _module, args: see(path, args[0])

    handles = [layer.register_forward_pre_hook(hook(path)) for path, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()

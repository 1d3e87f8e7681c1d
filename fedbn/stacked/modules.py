"""Layers that compute K clients with their own code: `AnyBatchNorm` with ``channelwise`` and parametrized weights.

A layer that computes each channel by itself computes K clients when its tensors hold K times as many channels, in the
layout of `fedbn.stacked.program`. So does a parametrization that computes each row of a weight by itself
(``rowwise = True``), such as weight normalization.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, cast

from torch import Tensor, nn
from torch.nn.utils.parametrizations import _WeightNorm
from torch.nn.utils.parametrize import is_parametrized, type_before_parametrizations

from fedbn.nn.roles import State
from fedbn.stacked.layers import FEATURE_LAYERS, IMAGE_LAYERS, STACKED_LAYERS, StackContext, StackedLayer

ROWWISE_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
"""Layers whose weight has a row for each output."""


def copy_without_tensors(model: nn.Module) -> nn.Module:
    """A copy of a model that shares its tensors."""
    return copy.deepcopy(model, {id(t): t for t in (*model.parameters(), *model.buffers())})


def with_tensors(module: nn.Module, tensors: Mapping[str, Tensor]) -> nn.Module:
    """A copy of a module that computes with other tensors, by name; operations in place change them.

    >>> import torch
    >>> layer = with_tensors(nn.BatchNorm1d(2), {"weight": torch.ones(6), "num_batches_tracked": torch.zeros(3)})
    >>> layer.weight.shape, layer.running_mean.shape
    (torch.Size([6]), torch.Size([2]))
    """
    copied = copy_without_tensors(module)
    for name, tensor in tensors.items():
        path, _, entry = name.rpartition(".")
        owner = copied.get_submodule(path)
        cast(dict[str, Any], owner._parameters if entry in owner._parameters else owner._buffers)[entry] = tensor
    return copied


def entries(model: nn.Module) -> State:
    """Entries of a model's state, and the buffers of channelwise layers that do not belong to it, such as sums."""
    sums = {
        f"{path}.{name}".lstrip("."): buffer
        for path, module in model.named_modules()
        if is_channelwise(module)
        for name, buffer in module.named_buffers(recurse=False)
    }
    return {**model.state_dict(), **sums}


def is_channelwise(module: nn.Module) -> bool:
    """Whether exactly this type of layer declares that it computes each channel by itself."""
    return "channelwise" in vars(type(module))


def layer_type(module: nn.Module) -> type[nn.Module]:
    """Type of a layer, without the parametrization of its weight if its rows are independent."""
    if not is_parametrized(module):
        return type(module)
    parametrizations = cast(Any, module).parametrizations
    rowwise = list(parametrizations) == ["weight"] and all(_is_rowwise(p) for p in parametrizations.weight)
    kind = type_before_parametrizations(module)
    return kind if rowwise and kind in ROWWISE_LAYERS else type(module)


def _is_rowwise(parametrization: nn.Module) -> bool:
    if type(parametrization) is _WeightNorm:
        return parametrization.dim == 0
    return "rowwise" in vars(type(parametrization))


def stacked_layer(module: nn.Module) -> StackedLayer | None:
    """The stacked implementation of a layer; None if there is none.

    Types are matched exactly, because a subclass may compute something else.
    """
    if is_channelwise(module):
        return channelwise
    if is_parametrized(module):
        return parametrized if layer_type(module) is not type(module) else None
    return STACKED_LAYERS.get(type(module))


def accepts_images(compute: StackedLayer) -> bool:
    """Whether a layer has the same result on signals and on images of height one."""
    return compute in IMAGE_LAYERS or compute in OWN_CODE


def accepts_features(module: nn.Module) -> bool:
    """Whether a layer also works on activations ``[K, C, B]``."""
    return layer_type(module) in FEATURE_LAYERS or stacked_layer(module) is channelwise


def channelwise(m: Any, context: StackContext, x: Tensor) -> Tensor:
    """K layers as one with K*C channels, of which each is computed by itself."""
    return m(x.flatten(0, 1).mT).mT.view(x.shape) if context.batch_last else m(x)


def parametrized(m: Any, context: StackContext, x: Tensor) -> Tensor:
    """A layer whose weight is computed row by row; the rows of all clients are one tensor."""
    kind, weight, bias = layer_type(m), m.parametrizations.weight(), m.bias
    if kind is nn.Linear:
        weight = weight.unflatten(0, (context.k, -1))
        bias = None if bias is None else bias.view(context.k, 1, -1)
    tensors = {"weight": weight} if bias is None else {"weight": weight, "bias": bias}
    return STACKED_LAYERS[kind](m, replace(context, tensors=tensors), x)


OWN_CODE: tuple[StackedLayer, ...] = (channelwise, parametrized)
"""Implementations that call a copy of the module with the tensors of all clients (`with_tensors`)."""

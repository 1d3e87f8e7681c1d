"""Plain networks, whose layers can be replaced: no compilation, no wrappers, no hooks that compute weights."""

from __future__ import annotations

import copy
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize, remove_spectral_norm, remove_weight_norm
from torch.nn.utils.parametrizations import _SpectralNorm, weight_norm
from torch.nn.utils.spectral_norm import SpectralNorm as SpectralNormHook
from torch.nn.utils.spectral_norm import SpectralNormLoadStateDictPreHook
from torch.nn.utils.weight_norm import WeightNorm as WeightNormHook

from fedbn.errors import UserError
from fedbn.nn.roles import State

WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel)


class UnitVectors(_SpectralNorm):
    """PyTorch's spectral normalization, whose vectors are scaled to length one when they are loaded.

    The mean of several clients' vectors is shorter, and dividing by the singular value of shorter vectors would enlarge
    the weights.
    """

    def _load_from_state_dict(self, *arguments: Any, **options: Any) -> None:
        super()._load_from_state_dict(*arguments, **options)
        with torch.no_grad():
            for vector in self.buffers(recurse=False):
                vector.copy_(F.normalize(vector, dim=0, eps=self.eps))


class HookOrder(UnitVectors):
    """Spectral normalization with the power iteration of the older ``torch.nn.utils.spectral_norm``."""

    @torch.no_grad()
    def _power_method(self, weight_mat: Tensor, n_power_iterations: int) -> None:
        for _ in range(n_power_iterations):
            self._v = F.normalize(torch.mv(weight_mat.t(), self._u), dim=0, eps=self.eps, out=self._v)
            self._u = F.normalize(torch.mv(weight_mat, self._v), dim=0, eps=self.eps, out=self._u)


def plain(model: nn.Module) -> nn.Module:
    """The network inside wrappers, with weights that are computed by parametrizations instead of hooks; in place.

    Compiled modules and `torch.nn.DataParallel` are unwrapped. The hooks of ``torch.nn.utils.weight_norm`` and
    ``torch.nn.utils.spectral_norm``, with which a network cannot be copied, become parametrizations with the same
    values.

    Raises:
        UserError: the model has TorchScript modules.

    >>> plain(nn.DataParallel(nn.Sequential(nn.Linear(2, 2))))
    Sequential(
      (0): Linear(in_features=2, out_features=2, bias=True)
    )
    """
    model = _unwrapped(model)
    for path, module in list(model.named_modules(remove_duplicate=False)):
        if isinstance(module, torch.jit.ScriptModule):
            raise UserError(
                f"{f'module {path!r}' if path else 'it'} is compiled by TorchScript, which hides the types of layers: "
                "return the torch.nn.Module that was scripted or traced"
            )
        for name, child in list(module.named_children()):
            if (inner := _unwrapped(child)) is not child:
                setattr(module, name, inner)
    for module in list(model.modules()):
        module._compiled_call_impl = None  # of nn.Module.compile
        original = getattr(vars(module).get("forward"), "_torchdynamo_orig_callable", None)
        if getattr(original, "__qualname__", "") == type(module).forward.__qualname__:  # only compiled
            del module.forward
        for hook in list(module._forward_pre_hooks.values()):
            if isinstance(hook, WeightNormHook):
                _convert_weight_norm(module, hook)
            elif isinstance(hook, SpectralNormHook):
                _convert_spectral_norm(module, hook)
        if type(module) is _SpectralNorm:
            module.__class__ = UnitVectors
    return model


def _unwrapped(model: nn.Module) -> nn.Module:
    while True:
        if isinstance(model, torch.jit.ScriptModule):
            return model
        if isinstance(model, WRAPPERS):
            model = model.module
        elif isinstance(inner := vars(model).get("_modules", {}).get("_orig_mod"), nn.Module):
            model = inner
        else:
            return model


def _convert_weight_norm(module: nn.Module, hook: WeightNormHook) -> None:
    name = hook.name
    g, v = (getattr(module, f"{name}_{part}") for part in "gv")
    remove_weight_norm(module, name)
    weight_norm(module, name, hook.dim)
    new = cast(Any, module.parametrizations)[name]
    _copy(new.original0, g)
    _copy(new.original1, v)
    new.hook_names = {"original0": f"{name}_g", "original1": f"{name}_v"}


def _convert_spectral_norm(module: nn.Module, hook: SpectralNormHook) -> None:
    name = hook.name
    weight, u, v = (getattr(module, f"{name}_{part}") for part in ("orig", "u", "v"))
    remove_spectral_norm(module, name)
    for key, wrapped in list(module._load_state_dict_pre_hooks.items()):  # left by `remove_spectral_norm`
        if isinstance(getattr(wrapped, "hook", None), SpectralNormLoadStateDictPreHook):
            del module._load_state_dict_pre_hooks[key]
    _copy(getattr(module, name), weight)
    norm = HookOrder(weight.detach(), hook.n_power_iterations, hook.dim, hook.eps).train(module.training)
    norm._u.copy_(u)
    norm._v.copy_(v)
    parametrize.register_parametrization(module, name, norm, unsafe=True)
    new = cast(Any, module.parametrizations)[name]
    new.hook_names = {"original": f"{name}_orig", "0._u": f"{name}_u", "0._v": f"{name}_v"}


def _copy(new: Tensor, old: Tensor) -> None:
    with torch.no_grad():
        new.copy_(old)
    new.requires_grad_(old.requires_grad)


def hook_names(model: nn.Module) -> dict[str, str]:
    """Names of entries that `plain` has renamed -> names in the network with hooks."""
    renamed: dict[str, str] = {}
    for path, module in model.named_modules():
        prefix, _, _ = path.rpartition("parametrizations.")
        for new, old in getattr(module, "hook_names", {}).items():
            renamed[f"{path}.{new}"] = prefix + old
    return renamed


def with_hook_names(model: nn.Module, state: State) -> State:
    """A state of a network with the names that the entries had before `plain`."""
    renamed = hook_names(model)
    return {renamed.get(name, name): value for name, value in state.items()}


def without_hook_names(model: nn.Module, state: State) -> State:
    """The inverse of `with_hook_names`; entries that already have the names of ``model`` keep them."""
    renamed = {old: new for new, old in hook_names(model).items()}
    return {renamed.get(name, name): value for name, value in state.items()}


def fixed_weight(layer: nn.Module) -> nn.Module:
    """Replace the parametrization of a layer's weight, if any, by its value in evaluation mode, in place.

    >>> layer = fixed_weight(weight_norm(nn.Linear(2, 3)))
    >>> sorted(layer.state_dict())
    ['bias', 'weight']
    """
    for name in list(cast(Any, layer.parametrizations)) if parametrize.is_parametrized(layer) else ():
        mode = layer.training
        parametrize.remove_parametrizations(layer.eval(), name)
        layer.train(mode)
    return layer


def copy_model(model: nn.Module) -> nn.Module:
    """Independent copy of a model. Tensors that a forward pass has left in attributes are copied without their graph.

    Raises:
        UserError: the model cannot be copied.
    """
    memo: dict[int, Any] = {}
    for module in model.modules():
        _detach(vars(module), memo)
    try:
        return copy.deepcopy(model, memo)
    except Exception as error:  # attributes of a user's model may raise anything
        raise UserError(
            f"{type(model).__name__} cannot be copied ({error}): keep locks, open files and similar objects out of it"
        ) from error


def _detach(value: Any, memo: dict[int, Any]) -> None:
    if isinstance(value, Tensor):
        if not value.is_leaf:
            memo[id(value)] = value.detach().clone()
    elif isinstance(value, torch.Generator):
        memo[id(value)] = value.clone_state()
    elif isinstance(value, dict):
        for item in value.values():
            _detach(item, memo)
    elif isinstance(value, list | tuple):
        for item in value:
            _detach(item, memo)

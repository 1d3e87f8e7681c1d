"""Networks of K clients as one by ``torch.vmap``, for models that `fedbn.stacked.program` does not support.

The model's own forward runs once, on tensors with a hidden client axis, so most Python code, views and operations in
place keep their meaning. Every operation needs a batching rule of PyTorch.
``torch.func``, https://docs.pytorch.org/docs/stable/func.html
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Container, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from fedbn.nn.roles import State, statistics_layers
from fedbn.stacked.layers import Unstackable
from fedbn.stacked.modules import copy_without_tensors
from fedbn.stacked.tracing import check_structure

VMAP = "torch.vmap:"
"""Beginning of the reasons that PyTorch gives."""


@dataclass(frozen=True)
class VectorizedProgram:
    """A `fedbn.stacked.program.Program` by ``torch.vmap``, in the mode of the model.

    Attributes:
        model: the model; its tensors are not used.
        trained: names of the trainable parameters.
        norm_paths: paths of the layers with running statistics, in the order of computation.
        draws_noise: whether a forward pass draws dropout masks.
    """

    model: nn.Module
    trained: tuple[str, ...]
    norm_paths: list[str]
    draws_noise: bool
    fusable_weights: tuple[str, ...] = ()

    def supports_batch_last(self, axes: int) -> bool:
        """As in `fedbn.stacked.program.Program`."""
        return False

    def lay_out(self, name: str, stacked: Tensor) -> Tensor:
        """As in `fedbn.stacked.program.Program`."""
        return stacked

    def bind(
        self,
        tensors: State,
        k: int,
        noise: Sequence[torch.Generator | None] = (),
        *,
        batch_last: bool = False,
        fused_weights: Container[str] = (),
        lr: float | None = None,
        on_norm_input: Callable[[str, Tensor], None] | None = None,
    ) -> Callable[[Tensor], Tensor]:
        """As in `fedbn.stacked.program.Program`."""
        model = copy_without_tensors(self.model)  # `functional_call` replaces its tensors, in each thread
        if on_norm_input is not None:
            for path, layer in statistics_layers(model).items():
                layer.register_forward_pre_hook(_observe(partial(on_norm_input, path)))

        def one_client(entries: State, x: Tensor) -> Tensor:
            with _KeyedDropout(noise) if self.draws_noise else nullcontext():
                return cast(Tensor, torch.func.functional_call(model, entries, (x,)))

        def forward(x: Tensor) -> Tensor:
            # The copy protects the caller's data from operations in place.
            own = x.unflatten(1, (k, -1)).transpose(0, 1).clone(memory_format=torch.contiguous_format)
            outputs = torch.vmap(one_client)(tensors, own)
            if not isinstance(outputs, Tensor):
                raise Unstackable(f"forward of {type(model).__name__} does not map one tensor to one tensor")
            return outputs.transpose(0, 1).flatten(1, 2)

        return forward


def vectorize(model: nn.Module, x: Tensor) -> VectorizedProgram:
    """Build the vectorized program of a model in its current training mode.

    Args:
        model: the model.
        x: ``[n, *shape]`` examples for a first forward pass; the model does not change.

    Raises:
        Unstackable: an operation cannot be vectorized, or draws random numbers other than dropout masks.

    >>> net = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.PReLU(), nn.Dropout(0.5))
    >>> program = vectorize(net, torch.randn(5, 4))
    >>> program.norm_paths, program.draws_noise
    (['1'], True)
    """
    check_structure(model)
    trained = tuple(n for n, p in model.named_parameters() if p.requires_grad)
    program = VectorizedProgram(model, trained, [], False)
    try:
        try:
            return replace(program, norm_paths=_first_pass(program, x))
        except RuntimeError as error:
            if "randomness" not in str(error):
                raise
            program = replace(program, draws_noise=True)
            return replace(program, norm_paths=_first_pass(program, x))
    except Unstackable:
        raise
    except Exception as error:  # the user's forward may raise anything
        reason = str(error).strip().partition("\n")[0].partition(". ")[0] or type(error).__name__
        raise Unstackable(f"{VMAP} {reason.removeprefix('vmap: ')}"[:200]) from None


def _first_pass(program: VectorizedProgram, x: Tensor) -> list[str]:
    """Paths of the layers with running statistics in the order in which a forward pass computes them."""
    state = {n: v.detach()[None].clone() for n, v in program.model.state_dict().items()}
    paths: list[str] = []
    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("error", ".*performance drop")  # an operation that is not vectorized
        noise = [torch.Generator(x.device).manual_seed(0)]
        program.bind(state, 1, noise, on_norm_input=lambda path, _: paths.append(path))(x)
    return paths


class _KeyedDropout(TorchFunctionMode):
    """Dropout with the masks that each client would draw when trained alone."""

    def __init__(self, noise: Sequence[torch.Generator | None]) -> None:
        super().__init__()
        self.noise = noise

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in _DROPOUT:
            return func(*args, **(kwargs or {}))
        return self._dropout(*args, **(kwargs or {}), whole_channels=_DROPOUT[func])

    def _dropout(
        self, x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False, *, whole_channels: bool
    ) -> Tensor:
        if not training or p == 0:
            return x
        shape = (*x.shape[:2], *[1] * (x.dim() - 2)) if whole_channels else tuple(x.shape)
        masks = _Masks.apply(x, shape, p, self.noise)  # type: ignore[no-untyped-call]
        return cast(Tensor, x.mul_(masks) if inplace else x * masks)


_DROPOUT = {F.dropout: False, F.dropout1d: True, F.dropout2d: True, F.dropout3d: True}
"""Dropout functions, and whether they drop whole channels."""


class _Masks(torch.autograd.Function):
    """Scaled dropout masks of all clients; `vmap` is called with the hidden client axis."""

    @staticmethod
    def forward(x: Tensor, shape: tuple[int, ...], p: float, noise: Sequence[torch.Generator | None]) -> Tensor:
        raise NotImplementedError("activations without a client axis")

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Nothing to save."""

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[None, ...]:
        return (None,) * 4

    @staticmethod
    def vmap(info: Any, in_dims: Any, x: Tensor, shape: Any, p: float, noise: Any) -> tuple[Tensor, int]:
        masks = [x.new_empty(shape).bernoulli_(1 - p, generator=draw) for draw in noise]
        return (torch.stack(masks) * 0 if p == 1 else torch.stack(masks).div_(1 - p)), 0


class _Observed(torch.autograd.Function):
    """The identity, which calls a function with the activations of all clients; without gradients."""

    @staticmethod
    def forward(x: Tensor, callback: Callable[[Tensor], None]) -> Tensor:
        raise NotImplementedError("activations without a client axis")

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Nothing to save."""

    @staticmethod
    def vmap(info: Any, in_dims: Any, x: Tensor, callback: Callable[[Tensor], None]) -> tuple[Tensor, int]:
        clients_first = x.movedim(in_dims[0], 0)
        callback(clients_first.transpose(0, 1).flatten(1, 2))
        return clients_first, 0


def _observe(callback: Callable[[Tensor], None]) -> Callable[[nn.Module, tuple[Tensor]], Tensor]:
    return lambda module, args: cast(Tensor, _Observed.apply(args[0], callback))  # type: ignore[no-untyped-call]

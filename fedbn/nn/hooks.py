"""Forward hooks that capture the inputs of layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn


@contextmanager
def capture_inputs(layers: dict[str, nn.Module], callback: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Inside the ``with`` block, call ``callback(path, input)`` before each forward pass of one of ``layers``."""

    def hook(path: str) -> Callable[[nn.Module, tuple[Tensor, ...], dict[str, Tensor]], None]:
        return lambda _module, args, kwargs: callback(path, next(iter((*args, *kwargs.values()))))

    handles = [layer.register_forward_pre_hook(hook(path), with_kwargs=True) for path, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()

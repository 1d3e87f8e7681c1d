"""The logits among the outputs of a model that returns several tensors."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from fedbn.errors import UserError


def _parts(output: Any, name: str) -> Iterator[tuple[str, Any]]:
    fields: dict[str, Any]
    if isinstance(output, Mapping):
        fields = {str(k): v for k, v in output.items()}
    elif isinstance(output, tuple) and hasattr(output, "_fields"):
        fields = dict(zip(output._fields, output, strict=True))
    elif isinstance(output, tuple | list):
        fields = {str(i): v for i, v in enumerate(output)}
    elif dataclasses.is_dataclass(output) and not isinstance(output, type):
        fields = {f.name: getattr(output, f.name) for f in dataclasses.fields(output)}
    else:
        yield name, output
        return
    for key, value in fields.items():
        yield from _parts(value, f"{name}.{key}" if name else key)


def output_parts(output: Any) -> dict[str, Any]:
    """The parts of an output by name: keys, fields and positions, joined by dots; a tensor by itself has an empty name.

    >>> output_parts({"logits": 1, "hidden": (2, 3)})
    {'logits': 1, 'hidden.0': 2, 'hidden.1': 3}
    """
    return dict(_parts(output, ""))


def logits_name(output: Any, classes: int | None, prefer: Callable[[Tensor], bool] = lambda part: False) -> str:
    """Name of the logits in `output_parts`: the part called ``logits``, or the only tensor ``[N, classes]``.

    Args:
        output: output of a model.
        classes: number of classes; None if unknown.
        prefer: chooses among several tensors ``[N, classes]``.

    Raises:
        UserError: there is no such part, or there are several.

    >>> import torch
    >>> logits_name((torch.zeros(2, 8), torch.zeros(2, 3)), 3)
    '1'
    """
    if isinstance(output, Tensor):
        return ""
    found = {name: part for name, part in output_parts(output).items() if isinstance(part, Tensor)}
    named = [name for name in found if name.rpartition(".")[2] == "logits"]
    fits = [name for name, part in found.items() if part.dim() == 2 and part.shape[1] == classes]
    chosen = named or fits or (list(found) if len(found) == 1 else [])
    if len(chosen) > 1:
        chosen = [name for name in chosen if prefer(found[name])] or chosen
    if len(chosen) == 1:
        return chosen[0]
    if not found:
        raise UserError(f"the model returns a {type(output).__name__} without tensors: it must return logits")
    shapes = ", ".join(f"{name!r} {list(part.shape)}" for name, part in found.items())
    size = "" if classes is None else f" for {classes} classes"
    raise UserError(
        f"the model returns several outputs ({shapes}), of which {len(chosen) or 'none'} can be the logits{size}: "
        "return the logits [N, classes] alone, or as 'logits' in a dict, or name the layer behind them with --head"
    )


def return_logits(model: nn.Module, name: str, training_name: str) -> nn.Module:
    """Let ``forward`` return one part of the model's output, in place. The class becomes a subclass of itself.

    Args:
        model: takes one argument.
        name: part in evaluation mode, as in `output_parts`.
        training_name: part in training mode.
    """
    kind = type(model)

    def forward(self: nn.Module, x: Tensor) -> Any:
        return output_parts(kind.forward(self, x))[training_name if self.training else name]

    model.__class__ = type(kind.__name__, (kind,), {"forward": forward, "__module__": kind.__module__})
    return model

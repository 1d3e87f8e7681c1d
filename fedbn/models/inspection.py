"""Prepare a user's network: find its logits and its head by running two examples of zeros."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from fedbn.errors import UserError
from fedbn.nn.heads import HeadLayers, find_head
from fedbn.nn.outputs import logits_name, output_parts, return_logits
from fedbn.nn.plain import copy_model
from fedbn.nn.roles import CLASSES, is_below, require_paths, set_head

EXAMPLES = 2
"""Batch size: the smallest for which BatchNorm does not raise in training mode."""

NOTICE = "fedbn_head_notice"
"""Attribute of a model with the text of `head_notice`."""


def head_notice(model: nn.Module) -> str:
    """Why the head of a built model is ambiguous; empty if it is not."""
    return str(getattr(model, NOTICE, ""))


def example_batch(model: nn.Module, shape: tuple[int, ...]) -> Tensor:
    """Zeros ``[2, *shape]`` on the device and in the precision of a model."""
    weight = next((p for p in model.parameters() if p.is_floating_point()), torch.zeros(()))
    return torch.zeros(EXAMPLES, *shape, dtype=weight.dtype, device=weight.device)


def inspect_model(
    model: nn.Module, shape: tuple[int, ...], classes: int | None, chosen: tuple[str, ...] = ()
) -> nn.Module:
    """Let a model return its logits and set its head, in place, and return the model.

    If the model does not run on examples of this shape, the head is the last registered layer.

    Args:
        model: the network.
        shape: shape of an example.
        classes: number of classes; None: logits are only found by their name or if they are the only output.
        chosen: paths of the head; empty: the last parameterized layer before the logits.

    Raises:
        UserError: the logits are not among the outputs, a path matches nothing, or the model cannot be copied.

    >>> from fedbn.nn.roles import head
    >>> class Net(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.fc, self.body = nn.Linear(4, 2), nn.Linear(3, 4)
    ...     def forward(self, x):
    ...         h = self.body(x)
    ...         return self.fc(h), h
    >>> net = inspect_model(Net(), (3,), 2)
    >>> head(net), net(torch.zeros(5, 3)).shape
    (('fc',), torch.Size([5, 2]))
    """
    require_paths(model, chosen, "head")
    copied = copy_model(model)
    evaluation = _run(copied, shape, classes, chosen, train=False)
    computed_by = chosen or (evaluation.head.paths if evaluation is not None and evaluation.head is not None else ())
    training = _run(copied, shape, classes, computed_by, train=True)
    if evaluation is not None and (evaluation.name or (training and training.name)):
        return_logits(model, evaluation.name, training.name if training else evaluation.name)
    setattr(model, CLASSES, classes)
    if chosen:
        set_head(model, chosen)
    elif evaluation is not None and evaluation.head is not None:
        set_head(model, evaluation.head.paths)
        setattr(model, NOTICE, _notice(evaluation, training))
    return model


@dataclass(frozen=True)
class _Pass:
    """Result of a forward pass: name of the logits among the outputs, the number of outputs, and the head."""

    name: str
    outputs: int
    head: HeadLayers | None


def _run(
    model: nn.Module, shape: tuple[int, ...], classes: int | None, computed_by: tuple[str, ...], *, train: bool
) -> _Pass | None:
    """Run a copy of a model; None if it does not run. ``computed_by`` chooses among several candidates."""
    model.train(train).requires_grad_(False)
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.is_floating_point() or parameter.is_complex())
    x = example_batch(model, shape)
    if x.is_floating_point():
        x.requires_grad_()
    with torch.random.fork_rng(devices=[]), torch.enable_grad(), _activations(model) as activations:
        x = x * 1  # a leaf could not be changed in place
        activations.add(x.grad_fn)
        head_of = partial(find_head, model, activations=activations)

        def is_preferred(part: Tensor) -> bool:
            found = head_of(part)
            return found is not None and all(is_below(path, computed_by) for path in found.paths)

        try:
            output = model(x)
        except Exception:  # a user's forward may raise anything; `check_context` reports it
            return None
        try:
            name = logits_name(output, classes, is_preferred)
        except UserError:
            if classes is None:
                return None
            raise
        parts = output_parts(output)
        logits = parts[name]
        found = head_of(logits) if isinstance(logits, Tensor) else None
    return _Pass(name, len(parts), found)


@contextmanager
def _activations(model: nn.Module) -> Iterator[set[Any]]:
    """Inside the ``with`` block, collect the graph nodes of the outputs of all layers."""
    nodes: set[Any] = set()

    def hook(_module: nn.Module, _args: Any, output: Any) -> None:
        nodes.update(part.grad_fn for part in output_parts(output).values() if isinstance(part, Tensor))
        nodes.discard(None)

    computed = {
        m for module in model.modules() if isinstance(module, parametrize.ParametrizationList) for m in module.modules()
    }
    handles = [m.register_forward_hook(hook) for m in model.modules() if m not in computed]
    try:
        yield nodes
    finally:
        for handle in handles:
            handle.remove()


def _notice(evaluation: _Pass, training: _Pass | None) -> str:
    found = evaluation.head
    assert found is not None
    reasons = []
    if evaluation.outputs > 1:
        reasons.append(f"the model returns {evaluation.outputs} outputs, of which {evaluation.name!r} is used")
    elif training is not None and training.outputs > 1:
        reasons.append(f"in training the model returns {training.outputs} outputs, of which {training.name!r} is used")
    if found.parallel:
        reasons.append("several layers compute the logits side by side")
    if training is not None and training.head is not None and training.head.paths != found.paths:
        others = ", ".join(path for path in training.head.paths if path not in found.paths)
        reasons.append(f"in training, the logits also come from {others}" if others else "it differs in training")
    if found.tied:
        reasons.append(f"its weights are also those of {', '.join(found.tied)}")
    if not reasons:
        return ""
    return f"ambiguous head: {'; '.join(reasons)}. Treated as the head: {', '.join(found.paths)}; --head names others"

"""Hooks of strategies in stacked training: each client has a model of its own on which they run, as in a round alone.

While the clients train, the models share the memory of the stack, so a hook sees and changes the client's tensors.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fedbn.federation.context import RunContext
from fedbn.nn.plain import copy_model
from fedbn.nn.roles import State, clone
from fedbn.stacked.layers import Unstackable
from fedbn.stacked.modules import entries
from fedbn.strategies.base import NormStrategy, Progress

Hook = Callable[[nn.Module], None]

ModelWithParameters = tuple[nn.Module, dict[str, nn.Parameter]]
"""A model and its parameters by name."""


def defines(strategy: NormStrategy, *hooks: str) -> bool:
    """Whether a strategy defines any of some hooks.

    >>> from fedbn.strategies.base import strategy
    >>> defines(strategy("weight-norm"), "before_local_training"), defines(strategy("fedbn"), "before_local_training")
    (True, False)
    """
    return any(getattr(type(strategy), hook) is not getattr(NormStrategy, hook) for hook in hooks)


@dataclass
class ClientModel:
    """A client's model for the hooks of its strategy.

    Attributes:
        model: the model, in the training mode of the round.
        notes: tensors for the server besides the model.
    """

    model: nn.Module
    notes: State

    @staticmethod
    def start(ctx: RunContext, user: int, state: State, progress: Progress, unused: list[nn.Module]) -> ClientModel:
        """The model of a client after the hooks before training.

        Args:
            ctx: the run's context.
            user: index of the client.
            state: entries of its model.
            progress: the current round.
            unused: copies of the run's model from earlier rounds, one of which is taken.
        """
        # Several threads may train at once, so the run's own model is not used.
        model = unused.pop() if unused else copy_model(ctx.scratch)
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.grad, tensor.data = None, tensor.data.clone()  # no longer in the memory of a stack
        model.load_state_dict(state)
        notes = ctx.strategy.before_local_training(model, ctx.training_data(user), progress)
        ctx.strategy.set_training_mode(model, progress)
        return ClientModel(model, notes)

    def finish(self, ctx: RunContext, trained: State) -> State:
        """The state after training and the hook that follows it, whose notes are added."""
        with torch.no_grad():
            for name, value in entries(self.model).items():
                value.copy_(trained[name])
        self.notes = self.notes | ctx.strategy.after_local_training(self.model)
        return clone(self.model.state_dict())


def share_memory(models: Sequence[nn.Module], tensors: State) -> None:
    """Make the entries of the models views of the stack's tensors, in the layout of the program."""
    for i, model in enumerate(models):
        for name, value in (*model.named_parameters(), *model.named_buffers()):
            if name in tensors:
                value.data = tensors[name].detach().view(len(models), *value.shape)[i]


def before_step(
    hook: Hook, models: Sequence[ModelWithParameters], names: Sequence[str], gradients: Sequence[Tensor]
) -> list[Tensor | None]:
    """Call `on_before_optimizer_step` of each client, which may change or remove the gradients of its model.

    Args:
        hook: the hook.
        models: the models of the clients (`share_memory`).
        names: names of the parameters with a gradient.
        gradients: their gradients, in the layout of the program.

    Returns:
        The gradients after the hook; None where it has removed those of all clients.

    Raises:
        Unstackable: the hook draws random numbers, which would depend on the order of the clients, or it removes the
            gradients of some clients only.
    """
    gradients = [g.contiguous() for g in gradients]
    position = {name: i for i, name in enumerate(names)}
    removed = [0] * len(names)
    before = _generators()
    with torch.enable_grad():
        for k, (model, parameters) in enumerate(models):
            own = {}
            for name, parameter in parameters.items():
                i = position.get(name)
                parameter.grad = None
                if i is not None:
                    parameter.grad = view = gradients[i].view(len(models), *parameter.shape)[k]
                    own[i] = parameter, view
            hook(model)
            for i, (parameter, view) in own.items():
                if parameter.grad is None:
                    removed[i] += 1
                elif parameter.grad is not view:
                    view.copy_(parameter.grad.detach())
    if _generators() != before:
        raise Unstackable("the strategy draws random numbers before a step")
    if any(0 < count < len(models) for count in removed):
        raise Unstackable("the strategy removes the gradients of some clients only")
    return [None if count else g for count, g in zip(removed, gradients, strict=True)]


def _generators() -> Any:
    """States of the global generators."""
    state: Any = np.random.get_state(legacy=False)["state"]
    return torch.get_rng_state().numpy().tobytes(), random.getstate(), state["key"].tobytes(), state["pos"]

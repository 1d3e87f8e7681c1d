"""SCAFFOLD on parameters only: control variates that reduce client drift (Karimireddy et al., ICML 2020)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from fedbn.nn.roles import Role, State, with_prefix
from fedbn.nn.schema import TensorSpec
from fedbn.personalization.base import ClientTrainer, Personalization
from fedbn.strategies.base import Update

CONTROL = "control/"
"""Prefix of control variates in messages between clients and server."""


@dataclass
class _Correction:
    """Replace each gradient g by g - c_k + c, and average the original gradients g."""

    client: State
    server: State
    names: set[str]
    total: State = field(default_factory=dict)
    steps: int = 0

    def __call__(self, model: nn.Module) -> None:
        self.steps += 1
        for name, parameter in model.named_parameters():
            if name not in self.names or parameter.grad is None:
                continue
            total = self.total.setdefault(name, torch.zeros_like(parameter))
            total += parameter.grad
            if name in self.server:
                parameter.grad += self.server[name] - self.client.get(name, torch.zeros_like(parameter))

    def mean(self) -> dict[str, Tensor]:
        return {k: v / self.steps for k, v in self.total.items()}


@dataclass(frozen=True)
class Scaffold(Personalization):
    r"""Clients step along :math:`g-c_k+c`; afterwards :math:`c_k` is the mean of the gradients :math:`g`.

    https://arxiv.org/abs/1910.06378, option II, which equals that mean for plain SGD and also works with momentum.
    The server keeps :math:`c \leftarrow c+\frac1N\sum_{k\in S}(c_k^+-c_k)` over all :math:`N` clients. Only body
    and head are corrected: statistics have no gradient, and scale and shift may be local.

    >>> Scaffold().name
    'scaffold'
    """

    name = "scaffold"
    title = "SCAFFOLD"
    about = "control variates on body and head correct client drift"
    source = "Karimireddy et al. 2020"

    def notes_schema(self, model: nn.Module, roles: dict[str, Role]) -> dict[str, TensorSpec]:
        # Parameters without a gradient are absent.
        return {
            CONTROL + name: TensorSpec(p.dtype, tuple(p.shape), required=False)
            for name, p in model.named_parameters()
            if roles[name] in (Role.BODY, Role.HEAD)
        }

    def train(self, trainer: ClientTrainer) -> float:
        corrected = trainer.names(Role.BODY, Role.HEAD)
        correction = _Correction(trainer.method_state, with_prefix(trainer.broadcast, CONTROL), corrected)
        loss = trainer.fit(trainer.model, on_before_optimizer_step=correction)
        old, new = trainer.method_state, correction.mean()
        trainer.notes = {CONTROL + k: v - old[k] if k in old else v for k, v in new.items()}
        trainer.method_state = new
        return loss

    def server_broadcast(self, updates: Sequence[Update], broadcast: State, clients: int) -> State:
        out = dict(broadcast)
        for update in updates:
            for key, change in update.notes.items():
                if key.startswith(CONTROL):
                    out[key] = out.get(key, torch.zeros_like(change)) + change / clients
        return out

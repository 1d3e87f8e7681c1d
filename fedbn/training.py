"""Local training: plain SGD over shuffled batches, every draw keyed by (seed, round, user)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedbn.roles import State
from fedbn.run import Plan
from fedbn.scenario import Examples
from fedbn.seeds import generator, key


def batches(n: int, size: int, draw: torch.Generator) -> Iterator[Tensor]:
    """A shuffle of ``range(n)`` in batches of ``size``; a last batch of one joins the one before it.

    Batch normalisation has nothing to normalise a single value by.

    >>> [len(b) for b in batches(9, 4, torch.Generator())]
    [4, 5]
    """
    parts = list(torch.randperm(n, generator=draw).split(size))
    if len(parts) > 1 and len(parts[-1]) == 1 and size > 1:
        parts[-2:] = [torch.cat(parts[-2:])]
    yield from parts


def fit(
    model: nn.Module,
    data: Examples,
    plan: Plan,
    *,
    seed: int,
    round: int,
    user: int,
    shared: set[str],
    optimizer_state: State | None = None,
) -> tuple[float, State]:
    """Train ``model`` in place for one round.

    Args:
        model: in the mode that the strategy has set.
        data: the user's training examples, on the model's device.
        plan: settings.
        seed: the run's seed.
        round: the round, from 1.
        user: index of the user.
        shared: names of the shared entries, which FedProx pulls to their received values.
        optimizer_state: momentum buffers from the user's last round, by parameter name.

    Returns:
        Mean loss over the round's examples, and the momentum buffers (empty unless the plan keeps them).
    """
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    anchor = {n: p.detach().clone() for n, p in named.items() if n in shared} if plan.proximal else {}
    optimizer = torch.optim.SGD(
        named.values(), lr=plan.rate(round), momentum=plan.momentum, weight_decay=plan.weight_decay
    )
    for name, buffer in (optimizer_state or {}).items():
        optimizer.state[named[name]]["momentum_buffer"] = buffer.to(named[name].device).clone()
    total = torch.zeros((), device=data.x.device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(key(seed, "noise", round, user))  # dropout draws from the global generator
        for epoch in range(plan.local_epochs):
            draw = generator(seed, "shuffle", round, user, epoch)
            for index in batches(len(data), plan.batch_size, draw):
                index = index.to(data.x.device)
                optimizer.zero_grad()
                loss = F.cross_entropy(model(data.x[index]), data.y[index])
                total += loss.detach() * len(index)
                if anchor:
                    loss = loss + plan.proximal / 2 * sum(
                        ((named[n] - start) ** 2).sum() for n, start in anchor.items()
                    )
                loss.backward()
                optimizer.step()
    kept: State = {}
    if plan.optimizer_state == "keep":
        kept = {
            n: buffer.detach().clone()
            for n, p in named.items()
            if (buffer := optimizer.state[p].get("momentum_buffer")) is not None
        }
    return float(total) / (len(data) * plan.local_epochs), kept


def logits(model: nn.Module, x: Tensor, chunk: int = 512) -> Tensor:
    """Evaluation-mode outputs ``[n, classes]``, without gradients."""
    model.eval()
    with torch.no_grad():
        return torch.cat([model(rows) for rows in x.split(chunk)])

"""The evaluation matrix of many users at once: what `fedbn.federation.evaluation.evaluate_user` does, for a stack.

All columns that need nothing but the model and moments of what its layers meet: users lie side by side, those with
fewer examples are filled up, and what stands there counts for nothing. Statistics are measured in one forward pass in
place of one a layer: each layer's are replaced just before it is computed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from fedbn.federation.context import RunContext
from fedbn.federation.metrics import Column, Row, Score, scores
from fedbn.nn.roles import State, statistics_layers
from fedbn.online.stream import BLOCK
from fedbn.stacked.cohort import Assignment
from fedbn.stacked.program import Program
from fedbn.statistics.moments import Moments, pooled
from fedbn.statistics.recalibration import CHUNK, Reached
from fedbn.strategies.base import NormStrategy


class Evaluation(Assignment, Protocol):
    """One user's cells, not yet scored: what `fedbn.federation.client.client_evaluation` is given."""

    @property
    def columns(self) -> tuple[Column, ...]: ...
    @property
    def globally(self) -> tuple[Column, ...]: ...
    @property
    def client_statistics(self) -> dict[int, State] | None: ...


@dataclass(frozen=True)
class Filled:
    """Examples of K users side by side.

    Attributes:
        x: ``[K, B, *shape]``; behind a user's own stand copies of its first.
        n: how many are its own.
    """

    x: Tensor
    n: list[int]

    @staticmethod
    def of(parts: Sequence[Tensor]) -> Filled:
        """Of each user's ``[n, ...]``."""
        n = [len(p) for p in parts]
        if len(parts) == 1:
            return Filled(parts[0][None], n)
        widest = max(n)
        filled = [p if len(p) == widest else torch.cat([p, p[:1].expand(widest - len(p), *p.shape[1:])]) for p in parts]
        return Filled(torch.stack(filled), n)

    def split(self) -> list[Filled]:
        """In as few parts as computing may take at once; of some users a part may have nothing."""
        rows = max(1, min(CHUNK, AT_ONCE // (self.x[:, 0].numel() * self.x.element_size())))
        starts = range(0, self.x.shape[1], rows)
        return [Filled(self.x[:, at : at + rows], [min(max(n - at, 0), rows) for n in self.n]) for at in starts]

    def block(self, first: int, size: int) -> Filled:
        """The examples from ``first`` on of those users who have any; no user has more than the one before."""
        n = [min(size, n - first) for n in self.n if n > first]
        return Filled(self.x[: len(n), first : first + size], n)


AT_ONCE = 2**22
"""Bytes of inputs that are computed at once: their activations take many times as much memory."""


See = Callable[[str, Moments], None]
"""Given the path of a layer and the moments of its input, user by user, before it is computed."""


class Models:
    """K users' models side by side, in evaluation mode.

    Attributes:
        program: their program.
        k: how many.
        tensors: their entries, statistics as they are now.
    """

    def __init__(self, program: Program, tensors: State, axes: int) -> None:
        """Of entries ``[K, *shape]``, which are not written to; ``axes`` has a batch of one user's examples."""
        self.program, self.axes = program, axes
        self.k = len(next(iter(tensors.values())))
        self.across = program.across(axes) and self.k > 1
        self.statistics = {path: (f"{path}.running_mean", f"{path}.running_var") for path in program.watched}
        moving = {n for names in self.statistics.values() for n in names}
        self.tensors = {n: t.clone() if n in moving else t for n, t in tensors.items()}
        self._bound: dict[int, Callable[[Tensor], Tensor]] = {}
        self._see: Callable[[str, Tensor], None] | None = None

    def among(self, users: Sequence[int]) -> Models:
        """Some of them."""
        if len(users) == self.k:
            return self
        return Models(self.program, {n: t[users] for n, t in self.tensors.items()}, self.axes)

    def outputs(self, data: Filled) -> Tensor:
        """Logits ``[K, B, classes]``."""
        return torch.cat([self._forward(part) for part in data.split()], 1)

    def recalibrate(self, data: Filled) -> None:
        """As `fedbn.statistics.recalibration.recalibrate`: all statistics become those of the users' examples."""
        parts = data.split()
        if len(parts) == 1:
            self._forward(data, self._set)
            return
        for layer in self.statistics:
            total: list[Moments] = []

            def meet(path: str, moments: Moments, layer: str = layer, total: list[Moments] = total) -> None:
                if path == layer:
                    total.append(moments)
                    raise Reached

            for part in parts:
                with suppress(Reached):
                    self._forward(part, meet)
            self._set(layer, pooled(total))

    def follow(self, streams: Filled, prior: float) -> Tensor:
        """Logits ``[K, B, classes]`` of streams, as `fedbn.online.predict_online` gives them.

        Args:
            streams: in their order; no user's is longer than that of the user before.
            prior: weight of the statistics at the start, in windows.
        """
        source = {p: [self.tensors[n].clone() for n in names] for p, names in self.statistics.items()}
        met: dict[str, Moments] = {}
        out = []
        for first in range(0, streams.x.shape[1], BLOCK):
            block = streams.block(first, BLOCK)
            now: dict[str, Moments] = {}
            answers = self._forward(block, now.__setitem__)
            out.append(F.pad(answers, (0, 0, 0, 0, 0, self.k - len(block.n))))
            for path, moments in now.items() if prior < float("inf") else ():
                k = len(block.n)
                if path in met:
                    met[path] = Moments(met[path].n[:k], met[path].mean[:k], met[path].m2[:k]).merge(moments)
                else:
                    met[path] = moments
                weight = prior * float(met[path].n[0, 0]) / (first + block.n[0])
                mean, variance = (t[:k] for t in source[path])
                base = Moments.from_variance(weight, mean, variance)
                self._set(path, met[path].shrink(base, weight) if weight else met[path])
        return torch.cat(out, 1)

    def _set(self, path: str, moments: Moments) -> None:
        mean, variance = (self.tensors[n] for n in self.statistics[path])
        mean[: len(moments.mean)] = moments.mean.to(mean.dtype)
        variance[: len(moments.mean)] = moments.stored_variance().to(variance.dtype)

    def _forward(self, data: Filled, see: See | None = None) -> Tensor:
        """Logits of the first users, as many as ``data`` has; ``see`` gets what each layer's input is like."""
        k, size = data.x.shape[:2]
        if k not in self._bound:
            entries = {n: self.program.laid(n, t[:k]) for n, t in self.tensors.items()}
            self._bound[k] = self.program.bind(entries, k, across=self.across, watch=self._watch)
        self._see = None if see is None else lambda path, met: see(path, _moments(met, data.n, self.across))
        x = data.x.flatten(2).mT if self.across else data.x.transpose(0, 1).flatten(1, 2)
        with torch.no_grad():
            out = self._bound[k](x)
        return out.mT if self.across else out.view(size, k, -1).transpose(0, 1)

    def _watch(self, path: str, x: Tensor) -> None:
        if self._see is not None:
            self._see(path, x)


def _moments(x: Tensor, n: Sequence[int], across: bool) -> Moments:
    """Moments of each of K users' own examples, channel by channel; of activations as the program has them."""
    k = len(n)
    values = x.double().view(k, -1, x.shape[-1], 1) if across else x.double().reshape(len(x), k, -1, *x.shape[2:])
    if not across:
        values = values.flatten(3).permute(1, 2, 0, 3) if x.dim() > 2 else values.permute(1, 2, 0)[..., None]
    size, positions = values.shape[2:]
    own = torch.tensor(n, dtype=torch.float64, device=x.device)[:, None]
    count = own * positions
    if min(n) == size:
        mean = values.mean((2, 3))
        return Moments(count, mean, ((values - mean[..., None, None]) ** 2).sum((2, 3)))
    mask = (torch.arange(size, device=x.device) < own)[:, None, :, None]
    mean = (values * mask).sum((2, 3)) / count.clamp_min(1)
    return Moments(count, mean, (((values - mean[..., None, None]) * mask) ** 2).sum((2, 3)))


def stackable(ctx: RunContext, program: Program, column: Column) -> bool:
    """Whether a column needs nothing but the model and moments of what its layers meet."""
    if column == "aggregated":
        return True
    if program.watched != [*statistics_layers(ctx.scratch)]:  # other layers, or computed in another order or twice
        return False
    return column == "recalibrated" or (
        not ctx.run.rule and type(ctx.strategy).predict_stream is NormStrategy.predict_stream
    )


def evaluate_stack(
    ctx: RunContext, program: Program, jobs: Sequence[Evaluation], states: Sequence[State], column: Column
) -> list[list[Score]]:
    """A column's cells of many users, in their order; only if it is `stackable`.

    Args:
        ctx: the run's context.
        program: the model's, in evaluation mode.
        jobs: what is asked.
        states: the users' whole models.
        column: which.
    """
    order = sorted(range(len(jobs)), key=lambda i: -len(ctx.population.users[jobs[i].user].test))
    found = _side_by_side(ctx, program, [jobs[i] for i in order], [states[i] for i in order], column)
    done = dict(zip(order, found, strict=True))
    return [done[i] for i in range(len(jobs))]


def _side_by_side(
    ctx: RunContext, program: Program, jobs: Sequence[Evaluation], states: Sequence[State], column: Column
) -> list[list[Score]]:
    """The same, where no user has more test examples than the one before."""
    users = [ctx.population.users[job.user] for job in jobs]
    rows: list[Row] = ["unseen" if job.user in ctx.population.unseen else "own" for job in jobs]
    test, labels = Filled.of([p.test.x for p in users]), Filled.of([p.test.y for p in users]).x
    tensors = {n: torch.stack([s[n] for s in states]) if len(states) > 1 else v[None] for n, v in states[0].items()}
    models = Models(program, tensors, users[0].test.x.dim())
    if column == "recalibrated":
        models.recalibrate(Filled.of([p.train.x for p in users]))
    answers = models.follow(test, ctx.run.plan.online_prior) if column == "online" else models.outputs(test)
    out = [[own] for own in scores(rows, column, answers, labels, test.n)]
    if asked := [i for i, job in enumerate(jobs) if column in job.globally]:
        k, x, y = len(asked), ctx.everyone.x, ctx.everyone.y
        answers = models.among(asked).outputs(Filled(x.expand(k, *x.shape), [len(x)] * k))
        found = scores(["global"] * k, column, answers, y.expand(k, -1), [len(y)] * k)
        for i, cell in zip(asked, found, strict=True):
            out[i].append(cell)
    return out

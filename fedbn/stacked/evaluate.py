"""Evaluation of many users at once, equivalent to `fedbn.federation.evaluation.evaluate_user`.

It covers all columns that need only the model and moments of the inputs of its layers. Users are stacked; shorter
sets of examples are padded, and the padding is ignored. Statistics are measured in one forward pass instead of one per
layer: each layer's statistics are replaced just before it is computed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from fedbn.federation.cold_start import ClientStatistics
from fedbn.federation.context import RunContext
from fedbn.federation.metrics import Column, Row, Score, scores
from fedbn.nn.roles import State, statistics_layers
from fedbn.online.stream import BLOCK
from fedbn.stacked.cohort import ClientJob
from fedbn.stacked.program import Program
from fedbn.statistics.moments import Moments, pooled
from fedbn.statistics.recalibration import CHUNK, Reached
from fedbn.strategies.base import NormStrategy


class EvaluateJob(ClientJob, Protocol):
    """A pending evaluation of one user: the arguments of `fedbn.federation.client.client_evaluation`."""

    @property
    def columns(self) -> tuple[Column, ...]: ...
    @property
    def globally(self) -> tuple[Column, ...]: ...
    @property
    def client_statistics(self) -> ClientStatistics | None: ...
    @property
    def final(self) -> bool: ...


@dataclass(frozen=True)
class PaddedBatch:
    """Examples of K users, padded to the same number.

    Attributes:
        x: ``[K, B, *shape]``; the padding repeats the user's first example.
        n: number of examples of each user, without padding.
    """

    x: Tensor
    n: list[int]

    @staticmethod
    def of(parts: Sequence[Tensor]) -> PaddedBatch:
        """Pad and stack the tensors ``[n, ...]`` of all users."""
        n = [len(p) for p in parts]
        if len(parts) == 1:
            return PaddedBatch(parts[0][None], n)
        length = max(n)
        padded = [torch.cat([p, p[:1].expand(length - len(p), *p.shape[1:])]) if len(p) < length else p for p in parts]
        return PaddedBatch(torch.stack(padded), n)

    def split(self) -> list[PaddedBatch]:
        """Split into as few parts as `MAX_INPUT_BYTES` allows; a part can contain no examples of some users."""
        rows = max(1, min(CHUNK, MAX_INPUT_BYTES // (self.x[:, 0].numel() * self.x.element_size())))
        starts = range(0, self.x.shape[1], rows)
        return [PaddedBatch(self.x[:, i : i + rows], [min(max(n - i, 0), rows) for n in self.n]) for i in starts]

    def block(self, first: int, size: int) -> PaddedBatch:
        """Up to ``size`` examples from index ``first``, of the users that have any.

        Users must be sorted by decreasing number of examples.
        """
        n = [min(size, n - first) for n in self.n if n > first]
        return PaddedBatch(self.x[: len(n), first : first + size], n)


MAX_INPUT_BYTES = 2**22
"""Maximum bytes of the inputs of one forward pass; the activations take many times as much memory."""


MomentsCallback = Callable[[str, Moments], None]
"""Called with the path of a layer and the moments of its input, by user, before the layer is computed."""


class StackedModels:
    """The models of K users in one stack, in evaluation mode.

    Attributes:
        program: stacked program of the model.
        k: number of users.
        tensors: entries of all models, with the current statistics.
    """

    def __init__(self, program: Program, tensors: State, axes: int) -> None:
        """Create a stack from entries ``[K, *shape]``, which are not modified.

        ``axes`` is the number of axes of a batch of one user's examples.
        """
        self.program, self.axes = program, axes
        self.k = len(next(iter(tensors.values())))
        self.batch_last = program.supports_batch_last(axes) and self.k > 1
        self.statistics = {path: (f"{path}.running_mean", f"{path}.running_var") for path in program.norm_paths}
        statistics = {n for names in self.statistics.values() for n in names}
        self.tensors = {n: t.clone() if n in statistics else t for n, t in tensors.items()}
        self._bound: dict[int, Callable[[Tensor], Tensor]] = {}
        self._callback: Callable[[str, Tensor], None] | None = None

    def select(self, users: Sequence[int]) -> StackedModels:
        """The stack of some of the users."""
        if len(users) == self.k:
            return self
        return StackedModels(self.program, {n: t[users] for n, t in self.tensors.items()}, self.axes)

    def outputs(self, data: PaddedBatch) -> Tensor:
        """Outputs ``[K, B, *output_shape]``."""
        return torch.cat([self._forward(part) for part in data.split()], 1)

    def recalibrate(self, data: PaddedBatch) -> None:
        """Replace all statistics by those of ``data``, as `fedbn.statistics.recalibration.recalibrate` does."""
        parts = data.split()
        if len(parts) == 1:
            self._forward(data, self._set)
            return
        for layer in self.statistics:
            total: list[Moments] = []

            def add(path: str, moments: Moments, layer: str = layer, total: list[Moments] = total) -> None:
                if path == layer:
                    total.append(moments)
                    raise Reached

            for part in parts:
                with suppress(Reached):
                    self._forward(part, add)
            self._set(layer, pooled(total))

    def predict_online(self, streams: PaddedBatch, prior: float) -> Tensor:
        """Outputs ``[K, B, *output_shape]`` of streams, equal to those of `fedbn.online.predict_online`.

        Args:
            streams: one stream per user, sorted by decreasing length.
            prior: weight of the initial statistics, in windows.
        """
        source = {p: [self.tensors[n].clone() for n in names] for p, names in self.statistics.items()}
        stream_moments: dict[str, Moments] = {}
        out = []
        for first in range(0, streams.x.shape[1], BLOCK):
            block = streams.block(first, BLOCK)
            block_moments: dict[str, Moments] = {}
            outputs = self._forward(block, block_moments.__setitem__)
            out.append(F.pad(outputs, (*[0, 0] * (outputs.dim() - 1), 0, self.k - len(block.n))))
            for path, moments in block_moments.items() if prior < float("inf") else ():
                k = len(block.n)
                if path in stream_moments:
                    past = stream_moments[path]
                    moments = Moments(past.n[:k], past.mean[:k], past.m2[:k]).merge(moments)
                stream_moments[path] = moments
                weight = prior * float(moments.n[0, 0]) / (first + block.n[0])
                mean, variance = (t[:k] for t in source[path])
                base = Moments.from_variance(weight, mean, variance)
                self._set(path, moments.shrink(base, weight) if weight else moments)
        return torch.cat(out, 1)

    def _set(self, path: str, moments: Moments) -> None:
        mean, variance = (self.tensors[n] for n in self.statistics[path])
        mean[: len(moments.mean)] = moments.mean.to(mean.dtype)
        variance[: len(moments.mean)] = moments.stored_variance().to(variance.dtype)

    def _forward(self, data: PaddedBatch, callback: MomentsCallback | None = None) -> Tensor:
        """Outputs of the first ``len(data.n)`` users; ``callback`` gets the moments of the layers' inputs."""
        k, size = data.x.shape[:2]
        if k not in self._bound:
            state = {n: self.program.lay_out(n, t[:k]) for n, t in self.tensors.items()}
            self._bound[k] = self.program.bind(state, k, batch_last=self.batch_last, on_norm_input=self._on_norm_input)
        self._callback = callback and (lambda path, x: callback(path, _moments(x, data.n, self.batch_last)))
        x = data.x.flatten(2).mT if self.batch_last else data.x.transpose(0, 1).flatten(1, 2)
        with torch.no_grad():
            out = self._bound[k](x)
        return out.mT if self.batch_last else out.view(size, k, -1, *out.shape[2:]).transpose(0, 1)

    def _on_norm_input(self, path: str, x: Tensor) -> None:
        if self._callback is not None:
            self._callback(path, x)


def _moments(x: Tensor, n: Sequence[int], batch_last: bool) -> Moments:
    """Per-channel moments of the examples of each of K users, without padding, from activations of the program."""
    k = len(n)
    values = x.double().view(k, -1, x.shape[-1], 1) if batch_last else x.double().reshape(len(x), k, -1, *x.shape[2:])
    if not batch_last:
        values = values.flatten(3).permute(1, 2, 0, 3) if x.dim() > 2 else values.permute(1, 2, 0)[..., None]
    size, positions = values.shape[2:]
    sizes = torch.tensor(n, dtype=torch.float64, device=x.device)[:, None]
    count = sizes * positions
    if min(n) == size:
        mean = values.mean((2, 3))
        return Moments(count, mean, ((values - mean[..., None, None]) ** 2).sum((2, 3)))
    mask = (torch.arange(size, device=x.device) < sizes)[:, None, :, None]
    mean = (values * mask).sum((2, 3)) / count.clamp_min(1)
    return Moments(count, mean, (((values - mean[..., None, None]) * mask) ** 2).sum((2, 3)))


def is_stackable(ctx: RunContext, program: Program, column: Column) -> bool:
    """Whether a column needs only the model and moments of the inputs of its layers."""
    if column == "aggregated":
        return True
    if program.norm_paths != [*statistics_layers(ctx.scratch)]:  # other layers, another order, or shared layers
        return False
    follows_prior = not ctx.run.rule and type(ctx.strategy).predict_stream is NormStrategy.predict_stream
    return column == "recalibrated" or follows_prior


def evaluate_stack(
    ctx: RunContext, program: Program, jobs: Sequence[EvaluateJob], states: Sequence[State], column: Column
) -> list[list[Score]]:
    """Scores of one column for many users, in the order of ``jobs``; requires `is_stackable`.

    Args:
        ctx: the run's context.
        program: stacked program of the model in evaluation mode.
        jobs: evaluations of the users.
        states: complete models of the users.
        column: column to score.
    """
    order = sorted(range(len(jobs)), key=lambda i: -len(ctx.population.users[jobs[i].user].test))
    results = _evaluate_sorted(ctx, program, [jobs[i] for i in order], [states[i] for i in order], column)
    result_of = dict(zip(order, results, strict=True))
    return [result_of[i] for i in range(len(jobs))]


def _evaluate_sorted(
    ctx: RunContext, program: Program, jobs: Sequence[EvaluateJob], states: Sequence[State], column: Column
) -> list[list[Score]]:
    """`evaluate_stack` for users sorted by decreasing number of test examples."""
    users, final = [ctx.population.users[job.user] for job in jobs], jobs[0].final
    rows: list[Row] = ["unseen" if job.user in ctx.population.unseen else "own" for job in jobs]
    test, labels = PaddedBatch.of([p.test.x for p in users]), PaddedBatch.of([p.test.y for p in users]).x
    tensors = {n: torch.stack([s[n] for s in states]) if len(states) > 1 else v[None] for n, v in states[0].items()}
    models = StackedModels(program, tensors, users[0].test.x.dim())
    if column == "recalibrated":
        models.recalibrate(PaddedBatch.of([p.train.x for p in users]))
    outputs = models.predict_online(test, ctx.run.plan.online_prior) if column == "online" else models.outputs(test)
    out = [[cell] for cell in scores(ctx.task, rows, column, outputs, labels, test.n, final=final)]
    if selected := [i for i, job in enumerate(jobs) if column in job.globally]:
        k, x, y = len(selected), ctx.pooled_test.x, ctx.pooled_test.y
        outputs = models.select(selected).outputs(PaddedBatch(x.expand(k, *x.shape), [len(x)] * k))
        y = y.expand(k, *y.shape)
        global_scores = scores(ctx.task, ["global"] * k, column, outputs, y, [len(ctx.pooled_test)] * k, final=final)
        for i, cell in zip(selected, global_scores, strict=True):
            out[i].append(cell)
    return out

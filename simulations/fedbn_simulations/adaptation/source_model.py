"""The source model of a study: a federated model, its users and their streams."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from fedbn.data.population import Examples, User
from fedbn.errors import UserError
from fedbn.federation.context import RunContext
from fedbn.federation.labeled_sums import sums_of_clients
from fedbn.federation.run import Run
from fedbn.federation.setup import build_context
from fedbn.nn.conversion import require_statistics
from fedbn.nn.plain import copy_model
from fedbn.nn.roles import Role, State
from fedbn.online import Aligner, LayerPrior, MatchedHead, Rule, population_prior, source_prior
from fedbn.online.alignments.base import AlignmentPrior
from fedbn.online.prior import layer_priors
from fedbn.online.sums import SumsMethod
from fedbn.online.ttn_alpha import learn_alpha
from fedbn.online.validation import require_batch_norm_formula, require_independent_rows
from fedbn.seeds import generator
from fedbn.streams import Stream, stream
from fedbn_simulations.adaptation.methods import AdaptationMethod
from fedbn_simulations.engines.execute import Engine
from fedbn_simulations.experiments.tasks import CHECKPOINT, Report, Task, run_task
from fedbn_simulations.storage.checkpoint import load_outcome

SOURCE_WINDOWS = 512
"""Windows of seen users' training data available to methods before the stream (EATA's Fisher information)."""

UserGroup = Literal["unseen", "seen"]


@dataclass(frozen=True, eq=False)
class SourceModel:
    """A trained model with the context of its run.

    Attributes:
        run: the training run.
        model: the server's model, in evaluation mode.
        ctx: the context of the run.
    """

    run: Run
    model: nn.Module
    ctx: RunContext

    def users(self, which: UserGroup) -> list[User]:
        """The seen or the unseen users, in the order of the population.

        Raises:
            UserError: there are none.
        """
        population = self.ctx.population
        found = [population.users[i] for i in (population.unseen if which == "unseen" else population.seen)]
        if not found:
            raise UserError(
                f"scenario {self.run.scenario!r} has no unseen users to adapt to: hold some out, e.g. SCENARIO:unseen=2"
            )
        return found

    def streams(self, text: str, which: UserGroup) -> list[Stream]:
        """The users' streams, over their later recordings."""
        users, kind = self.users(which), stream(text)
        return kind.make_all([u.name for u in users], [kind.recording_of(u) for u in users], self.run.seed)

    @cached_property
    def source_windows(self) -> Tensor:
        """Unlabeled windows of seen users' training data, an equal share per user."""
        seen = [self.ctx.population.users[i].train.x for i in self.ctx.population.seen]
        share = max(2, SOURCE_WINDOWS // len(seen))
        draw = generator(self.run.seed, "source windows")
        return torch.cat([x[torch.randperm(len(x), generator=draw)[:share]] for x in seen])

    @cached_property
    def prior(self) -> dict[str, LayerPrior]:
        """The model's statistics, and statistics per class over seen users' training data.

        They are sums over users, so a federation can pool them without access to windows.
        """
        data = self.ctx.pooled_training_data
        return source_prior(self.model, data.x, data.y, len(self.ctx.population.classes))

    @cached_property
    def population(self) -> dict[str, LayerPrior]:
        """Mean and spread of seen users' statistics under the trained model. Also sums over users."""
        return population_prior(self.model, [self.ctx.population.users[i].train.x for i in self.ctx.population.seen])

    @cached_property
    def ttn_prior(self) -> dict[str, LayerPrior]:
        """The weights of the rule `ttn`, learned from one batch per seen user."""
        seen = [self.ctx.population.users[i].train for i in self.ctx.population.seen]
        draw = generator(self.run.seed, "ttn")
        rows = self.run.plan.batch_size
        chosen = [u.take(torch.randperm(len(u), generator=draw)[:rows]) for u in seen]
        return learn_alpha(self.model, [(c.x, c.y) for c in chosen], draw, loss=self.ctx.task.loss)

    def prior_for(self, chosen: Rule) -> dict[str, LayerPrior]:
        """The prior that a rule requires."""
        match chosen.requires:
            case "n0":
                return self.population
            case "class_mean":
                return self.prior
            case "alpha":
                return self.ttn_prior
            case _:
                return layer_priors(self.model)

    def sums_for(self, method: AdaptationMethod) -> tuple[Aligner | None, MatchedHead | None]:
        """The alignment and the matched head of a method, from sums over seen users' labeled training data.

        The run's privacy protection applies to the sums.

        Raises:
            UserError: the model or the data do not fit the method.
        """
        align, head = method.align, method.head
        return (
            None if align is None else Aligner(align, AlignmentPrior(**self._sums(align)), self.ctx.population.triples),
            None if head is None else MatchedHead(head, **self._sums(head)),
        )

    @cached_property
    def _sums(self) -> Callable[[SumsMethod], State]:
        return cache(lambda method: sums_of_clients(self.ctx, self.model, method))

    @cached_property
    def source_test(self) -> Examples:
        """Labeled test windows of seen users, on which forgetting is measured."""
        return self.ctx.pooled_test


def untrained_source_model(run: Run) -> SourceModel:
    """The model of a run before training, for checks.

    Raises:
        UserError: the strategy shares no model, the model has no statistics to follow, has layers that do not evaluate
            as BN, or mixes the windows of a batch.
    """
    ctx = build_context(run)
    if not ctx.ownership.shares(Role.BODY):
        raise UserError(f"strategy {run.strategy!r} shares no model for unseen users to start from: choose another")
    what, model = "online adaptation", ctx.load(ctx.initial).eval()
    require_statistics(model, what)
    require_batch_norm_formula(model, what)
    require_independent_rows(model, ctx.population.users[ctx.population.seen[0]].train.x[:4], what)
    return SourceModel(run, ctx.load(ctx.initial).eval(), ctx)


def train_source_model(run: Run, out: Path, engine: Engine, report: Report) -> SourceModel:
    """Train the model of a run, or read it if it is there.

    Raises:
        UserError: as in `untrained_source_model`.
    """
    task = Task(run, str(out / "runs" / run.id))
    ctx = untrained_source_model(run).ctx
    run_task(task, engine, report)
    outcome = load_outcome(Path(task.directory) / CHECKPOINT, run, ctx.population.sources)
    model = copy_model(ctx.load(ctx.assemble(outcome.server.serving, None))).eval()
    return SourceModel(run, model, ctx)

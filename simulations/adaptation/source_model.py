"""A trained model and the people it meets."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from fedbn.data.population import Examples, User
from fedbn.errors import UserError
from fedbn.federation.context import RunContext
from fedbn.federation.run import Run
from fedbn.federation.setup import build_context
from fedbn.nn.conversion import require_statistics
from fedbn.online import LayerPrior, Rule, population_prior, source_prior
from fedbn.online.prior import layer_priors
from fedbn.online.ttn_alpha import learn_alpha
from fedbn.seeds import generator
from fedbn.streams import Stream, stream
from simulations.engines.execute import Engine
from simulations.experiments.tasks import CHECKPOINT, Report, Task, run_task
from simulations.storage.checkpoint import load_outcome

SOURCE_WINDOWS = 512
"""Windows of seen users' training data that methods may look at before they begin (EATA's Fisher information)."""

UserGroup = Literal["unseen", "seen"]


@dataclass(frozen=True, eq=False)
class SourceModel:
    """A trained model and the people it meets.

    Attributes:
        run: how it was trained.
        model: the server's, in evaluation mode.
        ctx: the run made concrete.
    """

    run: Run
    model: nn.Module
    ctx: RunContext

    def users(self, which: UserGroup) -> list[User]:
        """The people of one kind, in the population's order.

        Raises:
            UserError: there are none.
        """
        population = self.ctx.population
        found = [population.users[i] for i in (population.unseen if which == "unseen" else population.seen)]
        if not found:
            raise UserError(
                f"scenario {self.run.scenario!r} holds out nobody, so there is nobody new to personalize for: give it "
                "unseen users, e.g. SCENARIO:unseen=2"
            )
        return found

    def streams(self, text: str, which: UserGroup) -> list[Stream]:
        """Everybody's stream over their later recordings."""
        users = self.users(which)
        return stream(text).of([u.name for u in users], [u.test for u in users], self.run.seed)

    @cached_property
    def source_windows(self) -> Tensor:
        """Unlabeled windows of seen users' training data, an equal share from each."""
        seen = [self.ctx.population.users[i].train.x for i in self.ctx.population.seen]
        share = max(2, SOURCE_WINDOWS // len(seen))
        draw = generator(self.run.seed, "source windows")
        return torch.cat([x[torch.randperm(len(x), generator=draw)[:share]] for x in seen])

    @cached_property
    def prior(self) -> dict[str, LayerPrior]:
        """The model's statistics, and for rules that ask for them those of each class over seen users' training data.

        They are sums over users, so a federation can pool them without seeing a window.
        """
        data = self.ctx.gathered
        return source_prior(self.model, data.x, data.y, len(self.ctx.population.classes))

    @cached_property
    def population(self) -> dict[str, LayerPrior]:
        """How seen users' statistics are and differ under the finished model; sums over users too."""
        return population_prior(self.model, [self.ctx.population.users[i].train.x for i in self.ctx.population.seen])

    @cached_property
    def weighed(self) -> dict[str, LayerPrior]:
        """The weights of `ttn`, learnt from a batch of each seen user."""
        seen = [self.ctx.population.users[i].train for i in self.ctx.population.seen]
        draw = generator(self.run.seed, "ttn")
        rows = self.run.plan.batch_size
        chosen = [u.take(torch.randperm(len(u), generator=draw)[:rows]) for u in seen]
        return learn_alpha(self.model, [(c.x, c.y) for c in chosen], draw)

    def prior_for(self, chosen: Rule) -> dict[str, LayerPrior]:
        """What users start from under a rule, and what it may know."""
        match chosen.wants:
            case "n0":
                return self.population
            case "class_mean":
                return self.prior
            case "alpha":
                return self.weighed
            case _:
                return layer_priors(self.model)

    @cached_property
    def source_test(self) -> Examples:
        """Labeled later windows of seen users, on which forgetting is measured."""
        return self.ctx.everyone


def train_source_model(run: Run, out: Path, engine: Engine, report: Report) -> SourceModel:
    """Train the model of a run, or read it if it is there.

    Raises:
        UserError: the strategy shares no model, or the model has no statistics to follow.
    """
    task = Task(run, str(out / "runs" / run.id))
    run_task(task, engine, report)
    ctx = build_context(run)
    outcome = load_outcome(Path(task.directory) / CHECKPOINT, run, ctx.population.sources)
    if str(ctx.ownership.owners["body"]) != "shared":  # type: ignore[index]
        raise UserError(f"strategy {run.strategy!r} shares no model that new people could start from: choose another")
    model = copy.deepcopy(ctx.load(ctx.assemble(outcome.server.serving, None))).eval()
    require_statistics(model, "personalization")
    return SourceModel(run, model, ctx)

"""A trained model that follows its users, with a rule that is named or that the federation chooses."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import cast

from torch import nn

from fedbn.federation.run import Run
from fedbn.federation.server import Outcome
from fedbn.federation.trained import trained_model
from fedbn.online import Aligner, LayerPrior, MatchedHead, Personalized, Rule, Store, personalize
from fedbn.online.fallback import FallbackModel
from fedbn_simulations.adaptation.cells import run_cell
from fedbn_simulations.adaptation.check import AUTO, Decision, decide, decide_stored
from fedbn_simulations.adaptation.methods import AdaptationMethod, check_classes, served_rule
from fedbn_simulations.adaptation.metric import StudyMetric
from fedbn_simulations.adaptation.source_model import SourceModel, untrained_source_model

CAPACITY = 4096
"""Users in memory."""


def following(
    model: nn.Module,
    method: AdaptationMethod,
    prior: Mapping[str, LayerPrior],
    *,
    classes: int | None = None,
    align: Aligner | None = None,
    head: MatchedHead | None = None,
    capacity: int = CAPACITY,
    store: Store | None = None,
) -> Personalized | FallbackModel:
    """A model with separate states of users that follow a rule; the arguments are those of `fedbn.personalize`."""
    net = personalize(
        model,
        cast(Rule, method.rule),
        prior,
        capacity,
        store=store,
        classes=classes,
        align=align if method.align else None,
        head=head if method.head else None,
    )
    return net if method.fallback is None else FallbackModel(net, model)


def source_of(run: Run, outcome: Outcome) -> SourceModel:
    """The model that a finished run serves to new users.

    Raises:
        UserError: as in `untrained_source_model`.
    """
    ctx = untrained_source_model(run).ctx
    return SourceModel(run, trained_model(ctx, outcome), ctx)


def choose_rule(source: SourceModel, out: Path | None = None) -> Decision:
    """The rule that the seen users choose, with the check ``seen``.

    Args:
        source: the source model.
        out: directory in which the parts of the check are stored and found again; None: they are not stored.
    """
    if out is not None:
        return decide_stored(source, out)
    return decide(source, "seen", StudyMetric.of(source.ctx.task), run_cell, lambda run: source)


def personalize_source(
    source: SourceModel, rule: str = AUTO, out: Path | None = None, capacity: int = CAPACITY
) -> Personalized | FallbackModel:
    """The source model with separate states of users.

    Args:
        source: the source model.
        rule: text of the rule, with an optional alignment, matched head and fallback; ``auto``: as in `choose_rule`.
        out: as in `choose_rule`.
        capacity: number of users in memory.

    Raises:
        UserError: an unknown rule, or one that does not fit the task or the data.
    """
    method = served_rule(choose_rule(source, out).chosen if rule == AUTO else rule)
    check_classes(source.ctx.task, [method], (), ())
    classes = len(source.ctx.population.classes) if source.ctx.task.has_posterior else None
    prior = source.prior_for(cast(Rule, method.rule))
    align, head = source.sums_for(method)
    return following(source.model, method, prior, classes=classes, align=align, head=head, capacity=capacity)

"""The model of a service: trained on a scenario, or provided by the user."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import nn

from fedbn.data.sensors import SensorLimits, sensor_limits
from fedbn.errors import UserError
from fedbn.integrations.pretrained import load_pretrained
from fedbn.models import build
from fedbn.nn.conversion import require_statistics
from fedbn.nn.roles import Role, roles
from fedbn.online import Aligner, LayerPrior, MatchedHead, Personalized, Rule, Store
from fedbn.online.fallback import FallbackModel
from fedbn.online.prequential import CLASSIFICATION
from fedbn.online.prior import layer_priors
from fedbn.online.rules.source import Source
from fedbn.tasks import Task
from fedbn_simulations.adaptation.following import following
from fedbn_simulations.adaptation.methods import check_classes, served_rule
from fedbn_simulations.adaptation.source_model import SourceModel


@dataclass(frozen=True)
class ServedModel:
    """A model with the metadata that a service needs.

    Attributes:
        model: in evaluation mode.
        shape: shape of a window.
        classes: class names; empty for tasks without classes.
        prior: initial statistics of users.
        task: the task of the model.
        outputs: names of the outputs.
        rule: text of the rule that follows users, with alignment, matched head and fallback (`served_rule`).
        align: its alignment.
        head: its matched head.
        reason: why this rule, one sentence; empty if it was named.
        sensors: limits of the windows of a worn sensor; None if they are not known.
    """

    model: nn.Module
    shape: tuple[int, ...]
    classes: tuple[str, ...]
    prior: Mapping[str, LayerPrior]
    task: Task = CLASSIFICATION
    outputs: tuple[str, ...] = ()
    rule: str = Source.name
    align: Aligner | None = None
    head: MatchedHead | None = None
    reason: str = ""
    sensors: SensorLimits | None = None

    def follower(self, capacity: int, store: Store | None = None) -> Personalized | FallbackModel:
        """The model with separate states of users that follow the rule.

        Raises:
            UserError: the rule needs sums of seen users that are missing, or does not fit the task or the model.
        """
        method = served_rule(self.rule)
        check_classes(self.task, [method], (), ())
        for what, chosen, fitted in (("alignment", method.align, self.align), ("head", method.head, self.head)):
            if chosen is not None and fitted is None:
                raise UserError(f"rule {self.rule!r}: its {what} needs sums of seen users; serve a scenario's model")
        return following(
            self.model,
            method,
            self.prior,
            classes=len(self.classes) or None,
            align=self.align,
            head=self.head,
            capacity=capacity,
            store=store,
        )

    @staticmethod
    def from_source(source: SourceModel, rule: str, reason: str = "") -> ServedModel:
        """A model trained on a scenario.

        Raises:
            UserError: the rule is not one that a service can follow, or does not fit the data.
        """
        population, task, method = source.ctx.population, source.ctx.task, served_rule(rule)
        names = tuple(population.classes)
        classes = names if task.has_posterior else ()
        prior = source.prior_for(cast(Rule, method.rule))
        align, head = source.sums_for(method)
        return ServedModel(
            source.model,
            population.shape,
            classes,
            prior,
            task,
            names,
            method.text,
            align,
            head,
            reason,
            sensor_limits(population),
        )

    @staticmethod
    def from_weights(
        model: str, weights: Path, shape: tuple[int, ...], classes: tuple[str, ...], rule: str
    ) -> ServedModel:
        """A model provided by the user.

        Args:
            model: built-in name or ``package.module:factory``.
            weights: as for `fedbn.integrations.pretrained.read_state`; must be complete, including the classifier.
            shape: shape of a window.
            classes: class names, in the order of the model's outputs.
            rule: rule that updates users' statistics.

        Raises:
            UserError: the weights do not fit the model, its outputs do not match the classes, it has no running
                statistics, or the rule needs information from federated training.
        """
        if len(classes) < 2 or len(set(classes)) < len(classes):
            raise UserError(f"--classes must name two different classes or more, not {', '.join(classes) or 'none'}")
        method = served_rule(rule)
        if method.align or method.head:
            raise UserError(
                f"rule {method.text!r} needs labeled sums of training users for its alignment or head: serve a "
                "scenario's model, or choose another --rule"
            )
        if needed := cast(Rule, method.rule).requires:
            raise UserError(
                f"rule {method.rule.name!r} needs statistics of training users ({needed}): serve a scenario's model, "
                "or choose another --rule"
            )
        net = build(model, shape, len(classes), seed=0)
        table = roles(net)
        if missing := [name for name in load_pretrained(net, weights) if table[name] is not Role.COUNTER]:
            raise UserError(
                f"the weights in {weights} have a classifier for other classes than the {len(classes)} of --classes "
                f"({', '.join(missing)} would stay untrained): name those that the model was trained for, in its order"
            )
        require_statistics(net, "serving")
        net.eval()
        with torch.no_grad():
            try:
                output_shape = list(net(torch.zeros(2, *shape)).shape)
            except Exception as error:  # a user's forward may raise anything
                raise UserError(
                    f"model {model!r} cannot take windows of shape {list(shape)} ({error}): check --shape"
                ) from error
        if output_shape != [2, len(classes)]:
            raise UserError(
                f"model {model!r} returns outputs of shape {output_shape} for 2 windows instead of "
                f"[2, {len(classes)}]: --classes must name every output once, and the model must return a tensor of "
                "logits"
            )
        return ServedModel(net, shape, classes, layer_priors(net), rule=method.text)

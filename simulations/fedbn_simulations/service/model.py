"""The model of a service: trained on a scenario, or provided by the user."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from fedbn.data.sensors import SensorLimits, sensor_limits
from fedbn.errors import UserError
from fedbn.integrations.pretrained import load_pretrained
from fedbn.models import build
from fedbn.nn.conversion import require_statistics
from fedbn.nn.roles import Role, roles
from fedbn.online import LayerPrior, Rule
from fedbn.online.prequential import CLASSIFICATION
from fedbn.online.prior import layer_priors
from fedbn.tasks import Task
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
        sensors: limits of the windows of a worn sensor; None if they are not known.
    """

    model: nn.Module
    shape: tuple[int, ...]
    classes: tuple[str, ...]
    prior: Mapping[str, LayerPrior]
    task: Task = CLASSIFICATION
    outputs: tuple[str, ...] = ()
    sensors: SensorLimits | None = None

    @staticmethod
    def from_source(source: SourceModel, rule: Rule) -> ServedModel:
        """A model trained on a scenario."""
        population, task = source.ctx.population, source.ctx.task
        names = tuple(population.classes)
        classes = names if task.has_posterior else ()
        limits = sensor_limits(population)
        return ServedModel(source.model, population.shape, classes, source.prior_for(rule), task, names, limits)

    @staticmethod
    def from_weights(
        model: str, weights: Path, shape: tuple[int, ...], classes: tuple[str, ...], rule: Rule
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
        if rule.requires:
            raise UserError(
                f"rule {rule.name!r} needs statistics of training users ({rule.requires}): serve a scenario's model, "
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
        return ServedModel(net, shape, classes, layer_priors(net))

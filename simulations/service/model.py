"""What a service serves: a model trained on a scenario, or one that a user brings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from fedbn.errors import UserError
from fedbn.integrations.pretrained import load_pretrained
from fedbn.models import build
from fedbn.nn.conversion import require_statistics
from fedbn.nn.roles import Role, roles
from fedbn.online import LayerPrior, Rule
from fedbn.online.prior import layer_priors
from simulations.adaptation.source_model import SourceModel


@dataclass(frozen=True)
class Served:
    """A model and what must be known to serve it.

    Attributes:
        model: in evaluation mode.
        shape: of a window.
        classes: their names.
        prior: what users start from.
    """

    model: nn.Module
    shape: tuple[int, ...]
    classes: tuple[str, ...]
    prior: Mapping[str, LayerPrior]

    @staticmethod
    def trained(source: SourceModel, rule: Rule) -> Served:
        """A model that was trained here."""
        population = source.ctx.population
        return Served(source.model, population.shape, tuple(population.classes), source.prior_for(rule))

    @staticmethod
    def brought(model: str, weights: Path, shape: tuple[int, ...], classes: tuple[str, ...], rule: Rule) -> Served:
        """A user's own model.

        Args:
            model: built-in name or ``package.module:factory``.
            weights: as for `fedbn.integrations.pretrained.read_state`; all of them, the classifier's too.
            shape: of a window.
            classes: their names, in the order of the model's outputs.
            rule: that will follow users.

        Raises:
            UserError: the weights are not the model's, its outputs are not the classes, it keeps no statistics, or the
                rule needs what only training here tells.
        """
        if len(classes) < 2 or len(set(classes)) < len(classes):
            raise UserError(f"--classes must name two different classes or more, not {', '.join(classes) or 'none'}")
        if rule.wants:
            raise UserError(
                f"rule {rule.name!r} needs what only training on users tells ({rule.wants}): serve a scenario's model, "
                "or choose another --rule"
            )
        made = build(model, shape, len(classes), seed=0)
        table = roles(made)
        if kept := [name for name in load_pretrained(made, weights) if table[name] is not Role.COUNTER]:
            raise UserError(
                f"the weights in {weights} have a classifier for other classes than the {len(classes)} of --classes "
                f"({', '.join(kept)} would stay untrained): name those that the model was trained for, in its order"
            )
        require_statistics(made, "serving")
        made.eval()
        with torch.no_grad():
            try:
                found = list(made(torch.zeros(2, *shape)).shape)
            except Exception as error:  # whatever a user's forward does
                raise UserError(
                    f"model {model!r} cannot take windows of shape {list(shape)} ({error}): check --shape"
                ) from error
        if found != [2, len(classes)]:
            raise UserError(
                f"model {model!r} gives outputs of shape {found} for 2 windows and not [2, {len(classes)}]: --classes "
                "must name every output once, and the model must return a tensor of logits"
            )
        return Served(made, shape, classes, layer_priors(made))

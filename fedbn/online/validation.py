"""Validation and conversion of the inputs of `fedbn.online.personalized.Personalized`."""

from __future__ import annotations

import copy
import unicodedata
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from fedbn.errors import UserError
from fedbn.nn.roles import statistics_layers
from fedbn.nn.rows import mixing_layer
from fedbn.online.bank import Bank, Group
from fedbn.online.rules.base import Rule

MAX_NAME_LENGTH = 128
"""Maximum number of characters in a user's name."""

Ids = str | int | Sequence[str | int] | Tensor
"""Users of a batch: one name per row, or one name for all. 7 and "7" are the same user."""


def canonical_name(user: object) -> str:
    """The canonical form of a user's name or number: text in Unicode's normal form C.

    Raises:
        UserError: empty, too long, or with characters that are not printable. In a Python string, bytes that are not
            UTF-8 are such characters.

    >>> canonical_name(7), canonical_name("e\u0301") == "\u00e9"
    ('7', True)
    """
    name = str(user)
    if not name.isascii():
        name = unicodedata.normalize("NFC", name)
    if not 0 < len(name) <= MAX_NAME_LENGTH or not name.isprintable():
        raise UserError(
            f"{name[:MAX_NAME_LENGTH]!r} is not a user's name: use 1 to {MAX_NAME_LENGTH} printable characters"
        )
    return name


def user_names(user: Ids, rows: int) -> list[str]:
    """One name per row.

    Raises:
        UserError: not one name per row, or a name that is not valid.
    """
    if isinstance(user, (str, int)):
        return [canonical_name(user)] * rows
    if isinstance(user, Tensor):
        user = user.tolist()
    if user is None or any(u is None for u in user):
        raise UserError("None is not a user: give every row the name or number of its user")
    names = [canonical_name(u) for u in user]
    if len(names) != rows:
        raise UserError(f"{rows} rows and {len(names)} users: give one name per row, or one name for all")
    return names


def require_finite(x: Tensor) -> None:
    """Raise an error for NaN and Inf. The sum is a fast test without false negatives."""
    if x.sum().isfinite() or (finite := x.isfinite().flatten(1).all(1)).all():
        return
    raise UserError(
        f"{int((~finite).sum())} of {len(x)} windows hold NaN or Inf (first: row {int((~finite).nonzero()[0])}): "
        "remove or impute them; no state was changed"
    )


def require_independent_rows(model: nn.Module, x: Tensor, what: str) -> None:
    """Raise if the answer for a window depends on the other windows of a batch, which may be other users'.

    Args:
        model: in evaluation mode.
        x: windows ``[n, *shape]``.
        what: what cannot be done with such a model, for the message.

    Raises:
        UserError: naming the layer that mixes windows.
    """
    if (where := mixing_layer(model, x)) is not None:
        raise UserError(
            f"{what} needs a model whose answer for a window does not depend on the other windows, but {where} of "
            f"{type(model).__name__} mixes the windows of a batch, also in evaluation: give BN layers running "
            "statistics (track_running_stats=True), or use layers that treat each window by itself"
        )


@torch.no_grad()
def require_batch_norm_formula(model: nn.Module, what: str) -> None:
    r"""Raise if a layer with statistics does not evaluate as BN, :math:`y=\gamma(x-\mu)/\sqrt{v+\epsilon}+\beta`.

    Each layer is evaluated with random statistics on random rows of different location and scale.

    Raises:
        UserError: naming the layer, such as IABN, which also uses the statistics of each window.
    """
    draw = torch.Generator().manual_seed(0)
    for path, layer in statistics_layers(model).items():
        probe = copy.deepcopy(layer).cpu().double().eval()
        for name, value in probe.named_buffers(recurse=False):
            if value.is_floating_point():
                random = torch.rand(value.shape, generator=draw, dtype=value.dtype)
                value.copy_(2 * random - 1 if name == "running_mean" else 10 ** (6 * random - 4))
        if not _evaluates_as_batch_norm(probe, draw):
            raise UserError(
                f"{what} replaces the statistics of BN, but layer {path!r} ({type(layer).__name__}) also uses other "
                "values in evaluation: choose a strategy or a model with BN, e.g. global-pooled"
            )


def _evaluates_as_batch_norm(layer: nn.Module, draw: torch.Generator) -> bool:
    mean, var = cast(Tensor, layer.running_mean), cast(Tensor, layer.running_var)
    weight, bias = getattr(layer, "weight", None), getattr(layer, "bias", None)
    for positions in ((), (5,), (3, 4), (2, 3, 2)):
        shape = (4, len(mean), *positions)
        scales = 10 ** torch.linspace(-1, 1, 4, dtype=mean.dtype).view(-1, *[1] * (len(shape) - 1))
        x = scales * (1 + torch.randn(shape, generator=draw, dtype=mean.dtype))
        try:
            actual = layer(x)
        except Exception:  # another number of axes
            continue
        expected = nn.functional.batch_norm(x, mean, var, weight, bias, False, 0.0, float(getattr(layer, "eps", 1e-5)))
        if actual.shape != x.shape or not torch.allclose(actual, expected, rtol=1e-6, atol=1e-9):
            return False
    return True


def validate_mask(mask: Tensor | None, x: Tensor) -> Tensor | None:
    """The mask, or None if there is no padding.

    Raises:
        UserError: wrong shape, or a row without any position.
    """
    if mask is None:
        return None
    if mask.shape != (len(x), x.shape[-1]) or x.dim() < 3:
        raise UserError(
            f"a mask has one entry per position of each window: pass [{len(x)}, {x.shape[-1]}], not "
            f"{list(mask.shape)}, for windows of shape {list(x.shape)}"
        )
    if not mask.bool().any(1).all():
        raise UserError("a window is all padding: remove it from the batch")
    return None if mask.bool().all() else mask.bool()


def split_duplicates(group: Group) -> list[Tensor]:
    """Split the rows of a batch into rounds, in order, so that each user has at most one row per round."""
    rounds: list[list[int]] = []
    counts = [0] * len(group.users)
    for i, user in enumerate(group.row.tolist()):
        if counts[user] == len(rounds):
            rounds.append([])
        rounds[counts[user]].append(i)
        counts[user] += 1
    return [torch.tensor(r, device=group.row.device) for r in rounds]


def arange_like(rows: Tensor) -> Tensor:
    """Indices 0, 1, ... of the rows."""
    return torch.arange(len(rows), device=rows.device)


def require_no_classes(rule: Rule, task: str) -> None:
    """Raise if a rule uses class probabilities; for tasks without them.

    Raises:
        UserError: the rule learns by class, or has an option that needs class probabilities or their entropy.
    """
    if rule.classwise or rule.gate or rule.diversity or rule.guard:
        raise UserError(
            f"rule {rule.name!r} learns by class, and task {task!r} has no class probabilities: choose a rule without "
            "classes, gate=, diversity= and guard=, such as pseudo or ema"
        )


def resolve_posterior(bank: Bank, logits: Tensor, posterior: Tensor | None, label: Tensor | None) -> Tensor:
    """Posteriors ``[B, K]``: from ``label`` where known, else from ``posterior`` or ``logits``.

    Raises:
        UserError: wrong shape, a label out of range, or the rule needs a posterior.
    """
    rule, classes = bank.rule, bank.classes
    shape = (len(logits), classes)
    if posterior is None and label is None:
        if rule.classwise or rule.gate or rule.diversity:
            raise UserError(f"rule {bank.rule_text!r} learns by class: commit(posterior=...) or commit(label=...)")
        return bank.source.mean.new_zeros(shape)
    result = logits.softmax(1) if posterior is None else posterior
    if result.shape != shape:
        raise UserError(
            f"posteriors must be {list(shape)}, not {list(result.shape)}: one row per window and {classes} classes, "
            "as in the last layer; use personalize(..., classes=K) if the model has another output"
        )
    result = result.to(bank.source.mean)
    if not result.isfinite().all():
        raise UserError("posteriors hold NaN or Inf: pass finite probabilities")
    if label is None:
        return result
    if label.shape != shape[:1] or bool((label < -1).any()) or bool((label >= classes).any()):
        raise UserError(f"label must be one class per row, 0 to {classes - 1}, or -1 if unknown")
    label = label.to(result.device)
    one_hot = nn.functional.one_hot(label.clamp_min(0), classes).to(result)
    return torch.where((label >= 0)[:, None], one_hot, result)


def class_weights(bank: Bank, labels: Tensor | None, n: int) -> Tensor:
    """Weights ``[n]`` with sum n and the same total for each class; all 1 without labels.

    Raises:
        UserError: not one label per window, a label out of range, or a class without windows.
    """
    like = bank.source.mean
    if labels is None:
        return like.new_ones(n)
    if labels.shape != (n,):
        raise UserError(f"{n} windows and labels of shape {list(labels.shape)}: give one per window")
    classes = bank.classes
    if invalid := sorted(set(labels.tolist()) - set(range(classes))):
        raise UserError(f"label {invalid[0]} is not one of the {classes} classes, 0 to {classes - 1}")
    if missing := sorted(set(range(classes)) - set(labels.tolist())):
        raise UserError(
            f"calibration lacks windows of class {', '.join(map(str, missing))}: record some, or calibrate "
            "without labels"
        )
    _, which, count = torch.unique(labels, return_inverse=True, return_counts=True)
    weights: Tensor = n / (len(count) * count[which])
    return weights.to(like)

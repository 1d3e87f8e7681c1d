"""What users of a `fedbn.online.personalized.Personalized` give it, checked and in the form that the bank takes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fedbn.errors import UserError
from fedbn.online.bank import Bank, Group

Ids = str | int | Sequence[str | int] | Tensor
"""Whose rows: one name a row, or one name for all. 7 and "7" are the same user."""


def names_of(user: Ids, rows: int) -> list[str]:
    """One name for each of so many rows.

    Raises:
        UserError: not one name a row.
    """
    if isinstance(user, (str, int)):
        return [str(user)] * rows
    if isinstance(user, Tensor):
        user = user.tolist()
    names = [str(u) for u in user or ()]
    if user is None or any(u is None for u in user):
        raise UserError("None names no user: give every row the name or number of whom it is of")
    if len(names) != rows:
        raise UserError(f"{rows} rows and {len(names)} users: give one name a row, or one name for all")
    return names


def require_finite(x: Tensor) -> None:
    """Raise for NaN and Inf; the sum is a quick look that no such value escapes."""
    if x.sum().isfinite() or (fine := x.isfinite().flatten(1).all(1)).all():
        return
    raise UserError(
        f"{int((~fine).sum())} of {len(x)} windows hold NaN or Inf (first: row {int((~fine).nonzero()[0])}): leave "
        "them out or impute them; nothing was learnt"
    )


def real_positions(mask: Tensor | None, x: Tensor) -> Tensor | None:
    """The mask, or None where nothing is padding.

    Raises:
        UserError: a mask of another shape, or a row without any position.
    """
    if mask is None:
        return None
    if mask.shape != (len(x), x.shape[-1]) or x.dim() < 3:
        raise UserError(
            f"a mask says which positions of each window are real: give [{len(x)}, {x.shape[-1]}], not "
            f"{list(mask.shape)}, for windows of shape {list(x.shape)}"
        )
    if not mask.bool().any(1).all():
        raise UserError("a window is padding from end to end: leave it out of the batch")
    return None if mask.bool().all() else mask.bool()


def in_rounds(group: Group) -> list[Tensor]:
    """Rows of the batch such that no user occurs twice in one round, in order."""
    rounds: list[list[int]] = []
    met = [0] * len(group.users)
    for i, user in enumerate(group.row.tolist()):
        if met[user] == len(rounds):
            rounds.append([])
        rounds[met[user]].append(i)
        met[user] += 1
    return [torch.tensor(r, device=group.row.device) for r in rounds]


def numbered(rows: Tensor) -> Tensor:
    """0, 1, ... for so many rows."""
    return torch.arange(len(rows), device=rows.device)


def resolve_posterior(bank: Bank, logits: Tensor, posterior: Tensor | None, label: Tensor | None) -> Tensor:
    """What rows are believed to be, ``[B, K]``: one class where ``label`` says so, else ``posterior`` or ``logits``.

    Raises:
        UserError: a wrong shape, a label out of range, or the rule needs to be told something.
    """
    rule, classes = bank.rule, bank.classes
    shape = (len(logits), classes)
    if posterior is None and label is None:
        if rule.classwise or rule.gate or rule.diversity:
            raise UserError(f"rule {bank.text!r} learns by class: commit(posterior=...) or commit(label=...)")
        return bank.source.mean.new_zeros(shape)
    belief = logits.softmax(1) if posterior is None else posterior
    if belief.shape != shape:
        raise UserError(
            f"posteriors must be {list(shape)}, not {list(belief.shape)}: one row a window and {classes} classes, "
            "as the last layer has; say personalize(..., classes=K) if the model ends otherwise"
        )
    belief = belief.to(bank.source.mean)
    if label is None:
        return belief
    if label.shape != shape[:1] or bool((label < -1).any()) or bool((label >= classes).any()):
        raise UserError(f"label must be one class a row, 0 to {classes - 1}, or -1 where it is not known")
    label = label.to(belief.device)
    told = nn.functional.one_hot(label.clamp_min(0), classes).to(belief)
    return torch.where((label >= 0)[:, None], told, belief)


def balance(bank: Bank, labels: Tensor | None, n: int) -> Tensor:
    """Weights ``[n]`` that add up to n, the same total for each class; all 1 without labels.

    Raises:
        UserError: not one label a window, one out of range, or a class without windows.
    """
    like = bank.source.mean
    if labels is None:
        return like.new_ones(n)
    if labels.shape != (n,):
        raise UserError(f"{n} windows and labels of shape {list(labels.shape)}: give one a window")
    classes = bank.classes
    if wrong := sorted(set(labels.tolist()) - set(range(classes))):
        raise UserError(f"label {wrong[0]} is none of the {classes} classes, 0 to {classes - 1}")
    if lacking := sorted(set(range(classes)) - set(labels.tolist())):
        raise UserError(
            f"calibration lacks windows of class {', '.join(map(str, lacking))}: record some, or give no labels to "
            "calibrate by what there is"
        )
    _, which, count = torch.unique(labels, return_inverse=True, return_counts=True)
    each: Tensor = n / (len(count) * count[which])
    return each.to(like)

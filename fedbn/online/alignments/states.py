"""State of a user's alignment as a value: checked before it is loaded, and merged with another one."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fedbn.online.alignments.base import Alignment

STATE = ("n", "mean", "value", "count", "evidence", "recent")
"""Names of the tensors in the state of a user."""

MAX_CELLS = 16
"""Largest number of cells in a valid state, relative to that of the alignment; each one more costs a merge."""

LARGEST_SUMMARY = 1e9
"""Largest absolute summary or evidence in a valid state."""


def is_valid(state: Mapping[str, Tensor], alignment: Alignment, dims: int) -> bool:
    """Whether a state has the right names, shapes and values; an empty one is a new user's.

    Args:
        state: the state.
        alignment: the alignment.
        dims: number of summaries D.
    """
    if not state:
        return True
    cells, value = len(state.get("n", ())), alignment.identity(dims).shape
    shapes = {"n": (cells,), "mean": (cells, dims), "value": value, "count": (2,), "evidence": ()}
    shapes |= {"recent": (alignment.recent, dims)}
    if {name: tuple(t.shape) for name, t in state.items()} != {name: tuple(s) for name, s in shapes.items()}:
        return False
    values = {name: t.double() for name, t in state.items()}
    counts = torch.cat([values["n"], values["count"]])
    others = torch.cat([values["mean"].flatten(), values["recent"].flatten(), values["evidence"][None]])
    return (
        cells <= MAX_CELLS * alignment.cells
        and bool(((counts >= 0) & (counts < 1e12)).all())
        and bool((values["n"] > 0).all())
        and bool((others.abs() <= LARGEST_SUMMARY).all())
        and alignment.valid(values["value"])
    )


def merge_states(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """State with the cells of both; parameters and last windows are those of the state with more windows.

    The parameters change with the next estimate.
    """
    if not a or not b:
        return dict(a or b)
    larger = a if a["count"][0] >= b["count"][0] else b
    joint = {name: torch.cat([a[name], b[name].to(a[name])]) for name in ("n", "mean")}
    total = {name: a[name] + b[name].to(a[name]) for name in ("count", "evidence")}
    return joint | total | {name: larger[name] for name in ("value", "recent")}

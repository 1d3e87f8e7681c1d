"""Weights that a user brings, into a model of theirs or ours: safe formats only, nothing skipped in silence."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from fedbn.errors import UserError
from fedbn.nn.roles import Role, State, roles

WRAPPINGS = ("state_dict", "model", "model_state", "model_state_dict")
"""Keys under which training scripts store a state dict beside other things."""


def read_state(path: str | Path) -> State:
    """A state dict from ``.safetensors``, or from a torch file read with ``weights_only`` (no code is run).

    A wrapping such as ``{"state_dict": ..., "epoch": ...}`` and the prefix ``module.`` of `nn.DataParallel` go.

    Raises:
        UserError: no such file, a file that would have to run code, or one that holds no state dict.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no weights at {path}: give a .safetensors, .pt or .pth file")
    try:
        if path.suffix == ".safetensors":
            found: Any = load_file(path)
        else:
            found = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, SafetensorError, RuntimeError, EOFError) as error:
        raise UserError(
            f"{path} cannot be read as weights alone ({str(error).splitlines()[0]}): save model.state_dict(), best "
            "with safetensors.torch.save_file; whole pickled models are refused because loading them runs code"
        ) from None
    for key in WRAPPINGS:
        if isinstance(found, dict) and isinstance(found.get(key), dict):
            found = found[key]
    if not (isinstance(found, dict) and found and all(isinstance(v, Tensor) for v in found.values())):
        raise UserError(f"{path} holds a {type(found).__name__} that is no state dict (names -> tensors)")
    prefix = "module."
    if all(k.startswith(prefix) for k in found):
        found = {k.removeprefix(prefix): v for k, v in found.items()}
    return dict(found)


def load_pretrained(model: nn.Module, path: str | Path) -> list[str]:
    """Load weights and statistics into ``model`` in place; a classifier for other classes keeps its initial values.

    Args:
        model: built for the new task.
        path: of weights, as in `read_state`; e.g. a state dict of torchvision or timm for a model of theirs.

    Returns:
        Names of the entries that kept their initial values.

    Raises:
        UserError: anything beyond the classifier (and batch counters) is missing, unknown or of another shape.

    >>> import tempfile; from safetensors.torch import save_file
    >>> old, new = (nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, n)) for n in (10, 2))
    >>> with tempfile.TemporaryDirectory() as place:
    ...     save_file(old.state_dict(), f"{place}/old.safetensors")
    ...     load_pretrained(new, f"{place}/old.safetensors")
    ['2.weight', '2.bias']
    >>> bool((old[0].weight == new[0].weight).all())
    True
    """
    found, own, table = read_state(path), model.state_dict(), roles(model)
    # Files older than PyTorch 0.4.1 have no batch counters, and nothing is lost without them.
    optional = {k for k, role in table.items() if role is Role.COUNTER}
    other = {k for k, v in own.items() if table[k] is Role.HEAD and k in found and found[k].shape != v.shape}
    missing = sorted(own.keys() - found.keys() - optional)
    foreign = sorted(found.keys() - own.keys())
    shapes = [k for k in own if k in found and k not in other and found[k].shape != own[k].shape]
    for what, names in (("lack", missing), ("have, unknown to the model,", foreign)):
        if names:
            raise UserError(
                f"the weights in {path} {what} {len(names)} entries ({', '.join(names[:3])}{', ...' * (len(names) > 3)}"
                f") for {type(model).__name__}: build the model that they were saved from"
            )
    if shapes:
        k = shapes[0]
        raise UserError(
            f"{k} has shape {list(found[k].shape)} in {path} and {list(own[k].shape)} in {type(model).__name__}: build "
            "the model at the width, depth and input shape that the weights were trained at"
        )
    head = {k for k, role in table.items() if role is Role.HEAD} if other else set()
    kept = [k for k in own if k in head or k not in found]
    model.load_state_dict({k: own[k] if k in kept else found[k] for k in own})
    return kept

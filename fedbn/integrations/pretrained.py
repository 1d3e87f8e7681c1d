"""Load pretrained weights: safe formats only, and no entry is skipped silently."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from fedbn.errors import UserError
from fedbn.nn.plain import without_hook_names
from fedbn.nn.roles import Role, State, roles

WRAPPER_KEYS = ("state_dict", "model", "model_state", "model_state_dict")
"""Keys under which training scripts store a state dict in a checkpoint."""


def read_state(path: str | Path) -> State:
    """Read a state dict from ``.safetensors``, or from a torch file with ``weights_only`` (no code is run).

    A wrapper such as ``{"state_dict": ..., "epoch": ...}``, the prefix ``module.`` of `nn.DataParallel` and the part
    ``_orig_mod.`` of compiled modules are removed.

    Raises:
        UserError: if the file does not exist, would have to run code, or contains no state dict.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no weights at {path}: specify a .safetensors, .pt or .pth file")
    try:
        if path.suffix == ".safetensors":
            state: Any = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, SafetensorError, RuntimeError, EOFError) as error:
        raise UserError(
            f"{path} cannot be read as weights alone ({str(error).splitlines()[0]}): save model.state_dict(), best "
            "with safetensors.torch.save_file; whole pickled models are refused because loading them runs code"
        ) from None
    for key in WRAPPER_KEYS:
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not (isinstance(state, dict) and state and all(isinstance(v, Tensor) for v in state.values())):
        raise UserError(
            f"{path} holds a {type(state).__name__} that is not a state dict (names -> tensors): save "
            "model.state_dict()"
        )
    state = {k.replace("_orig_mod.", ""): v for k, v in state.items()}
    prefix = "module."
    if all(k.startswith(prefix) for k in state):
        state = {k.removeprefix(prefix): v for k, v in state.items()}
    return dict(state)


def load_pretrained(model: nn.Module, path: str | Path) -> list[str]:
    """Load weights and statistics into ``model`` in place; a classifier with other classes keeps its initial values.

    Args:
        model: model for the new task.
        path: file with weights, as for `read_state`, e.g. a state dict of a model of torchvision or timm.

    Returns:
        Names of the entries that keep their initial values.

    Raises:
        UserError: if any entry except the classifier (and batch counters) is missing, unknown or of another shape.

    >>> import tempfile; from safetensors.torch import save_file
    >>> old, new = (nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, n)) for n in (10, 2))
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     save_file(old.state_dict(), f"{directory}/old.safetensors")
    ...     load_pretrained(new, f"{directory}/old.safetensors")
    ['2.weight', '2.bias']
    >>> bool((old[0].weight == new[0].weight).all())
    True
    """
    loaded, initial, role_of = without_hook_names(model, read_state(path)), model.state_dict(), roles(model)
    # Files from before PyTorch 0.4.1 have no batch counters, which are not needed.
    optional = {k for k, role in role_of.items() if role is Role.COUNTER}
    mismatched = {k for k, v in initial.items() if k in loaded and loaded[k].shape != v.shape}
    other_classes = any(role_of[k] is Role.HEAD for k in mismatched)
    missing = sorted(initial.keys() - loaded.keys() - optional)
    unknown = sorted(loaded.keys() - initial.keys())
    for problem, names in (("lack entries of", missing), ("have entries that are not in", unknown)):
        if names:
            raise UserError(
                f"the weights in {path} {problem} {type(model).__name__} ({len(names)}: "
                f"{', '.join(names[:3])}{', ...' * (len(names) > 3)}): build the model that they were saved from"
            )
    if shapes := [k for k in initial if k in mismatched and role_of[k] is not Role.HEAD]:
        k = shapes[0]
        raise UserError(
            f"{k} has shape {list(loaded[k].shape)} in {path} and {list(initial[k].shape)} in {type(model).__name__}: "
            "build the model at the width, depth and input shape that the weights were trained at"
        )
    not_loaded = [k for k in initial if k not in loaded or (other_classes and role_of[k] is Role.HEAD)]
    model.load_state_dict({k: initial[k] if k in not_loaded else loaded[k] for k in initial})
    return not_loaded

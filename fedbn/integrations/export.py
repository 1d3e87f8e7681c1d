"""Export a model to ONNX, torch.export or safetensors; the file does not depend on this project.

The file is read back and run, and its outputs must match those of the model. Otherwise the export fails.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.fx.experimental.optimization import fuse

from fedbn.errors import UserError, install_extra, unknown
from fedbn.nn.plain import copy_model, fixed_weight, with_hook_names, without_hook_names

TOLERANCE = 1e-4
"""Maximum difference between an output of the file and of the model, relative to the largest output."""


def fold_batch_norm(model: nn.Module) -> nn.Module:
    """Copy of the model in evaluation mode with BN layers folded into the preceding linear or convolutional layers.

    Raises:
        UserError: if the model cannot be traced, for example because it branches on values.

    >>> net = nn.Sequential(nn.Conv1d(2, 3, 3), nn.BatchNorm1d(3), nn.ReLU())
    >>> [type(m).__name__ for m in fold_batch_norm(net).children()]
    ['Conv1d', 'ReLU']
    """
    try:
        fixed = copy_model(model).eval()
        for layer in list(fixed.modules()):
            fixed_weight(layer)
        return fuse(fixed)
    except Exception as error:  # tracing a user's forward may raise any exception
        raise UserError(
            f"{type(model).__name__} cannot be traced, so BN cannot be folded ({error}): export without folding"
        ) from error


def export(model: nn.Module, example: Tensor, path: Path) -> float:
    """Write ``model`` in evaluation mode to a file; the suffix determines the format.

    Args:
        model: any model; for a `fedbn.online.Personalized`, the result of its ``export(user)``.
        example: input rows ``[n, *shape]``, at least 2. The file accepts any number of rows.
        path: ``.onnx`` (any ONNX runtime), ``.pt2`` (`torch.export.load`) or ``.safetensors`` (the state dict).

    Returns:
        The largest absolute difference between the outputs of the file and of the model on the example.

    Raises:
        UserError: if the suffix is unknown, packages are missing, the model cannot be exported, or the outputs of the
            file differ from those of the model.
    """
    path = Path(path)
    if path.suffix not in WRITERS:
        raise unknown("suffix of an export", path.suffix or path.name, WRITERS)
    model = model.eval()
    with torch.no_grad():
        expected = model(example)
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            exported = WRITERS[path.suffix](model, example, path)
        except ImportError as error:
            raise UserError(f"{path.suffix} needs packages ({error}): {install_extra('onnx')}") from None
        except (OSError, UserError):
            raise
        except Exception as error:  # exporters may raise any exception
            raise UserError(f"{type(model).__name__} cannot be exported as {path.suffix}: {error}") from error
        # Half of the rows too: the file must accept any number of rows.
        sizes = (len(example), max(1, len(example) // 2))
        differences = [(exported(example[:n]) - expected[:n]).abs().max() for n in sizes]
    difference = float(max(differences))
    if not difference <= TOLERANCE * max(1.0, float(expected.abs().max())):
        path.unlink()
        raise UserError(
            f"{path} would differ from the model by {difference:.2g}, so it was removed: use another suffix"
        )
    return difference


def _onnx(model: nn.Module, example: Tensor, path: Path) -> Callable[[Tensor], Tensor]:
    import onnxruntime
    import onnxscript as onnxscript  # needed by torch.onnx; imported first for a clear error if it is missing

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # raised inside the exporter
        # The exporter warns about every torchvision operator that is not installed.
        logger = logging.getLogger("torch.onnx")
        level = logger.level
        logger.setLevel(logging.ERROR)
        try:
            torch.onnx.export(
                model,
                (example,),
                path,
                input_names=["x"],
                output_names=["logits"],
                dynamic_shapes=({0: torch.export.Dim.DYNAMIC},),
                dynamo=True,
                external_data=False,
                verbose=False,
            )
        finally:
            logger.setLevel(level)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda x: torch.from_numpy(session.run(None, {"x": x.numpy()})[0])


def _pt2(model: nn.Module, example: Tensor, path: Path) -> Callable[[Tensor], Tensor]:
    program = torch.export.export(model, (example,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    torch.export.save(program, path)
    return torch.export.load(path).module()


def _safetensors(model: nn.Module, example: Tensor, path: Path) -> Callable[[Tensor], Tensor]:
    # The names are those of the user's network, which may compute weights by hooks.
    state = with_hook_names(model, model.state_dict())
    save_file({k: v.contiguous().clone() for k, v in state.items()}, path)
    model.load_state_dict(without_hook_names(model, load_file(path)))
    return model


WRITERS: dict[str, Callable[[nn.Module, Tensor, Path], Callable[[Tensor], Tensor]]] = {
    ".onnx": _onnx,
    ".pt2": _pt2,
    ".safetensors": _safetensors,
}

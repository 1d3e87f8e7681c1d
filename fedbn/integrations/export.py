"""A model as a file for elsewhere: ONNX, torch.export, or bare tensors; nothing of this project is needed to run it.

What is written is read back and run, and must say what the model says: an export that is almost right is refused.
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

from fedbn.errors import UserError, unknown

TOLERANCE = 1e-4
"""Largest difference of an output, relative to the largest output, that a file may have to its model."""


def folded(model: nn.Module) -> nn.Module:
    """A copy in evaluation mode, each BN layer right after a linear or convolutional one folded into it.

    Raises:
        UserError: the model cannot be traced, for example because it branches on values.

    >>> net = nn.Sequential(nn.Conv1d(2, 3, 3), nn.BatchNorm1d(3), nn.ReLU())
    >>> [type(m).__name__ for m in folded(net).children()]
    ['Conv1d', 'ReLU']
    """
    try:
        return fuse(model.eval())
    except Exception as error:  # whatever a user's forward does when it is traced
        raise UserError(
            f"{type(model).__name__} cannot be traced, so BN cannot be folded ({error}): export without folding"
        ) from error


def export(model: nn.Module, example: Tensor, path: Path) -> float:
    """Write ``model`` in evaluation mode to a file, its format told by the suffix.

    Args:
        model: any; of a `fedbn.online.Personalized` what its ``export(user)`` gives.
        example: rows ``[n, *shape]``, at least 2; the file takes any number of rows.
        path: ``.onnx`` (any ONNX runtime), ``.pt2`` (`torch.export.load`) or ``.safetensors`` (the state dict).

    Returns:
        The largest difference between an output of the file and of the model, on the example.

    Raises:
        UserError: another suffix, packages missing, a model that cannot be exported, or a file that says otherwise.
    """
    path = Path(path)
    if path.suffix not in WRITERS:
        raise unknown("suffix of an export", path.suffix or path.name, WRITERS)
    model = model.eval()
    with torch.no_grad():
        wanted = model(example)
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            read = WRITERS[path.suffix](model, example, path)
        except ImportError as error:
            raise UserError(f"{path.suffix} needs packages ({error}): pip install 'fedbn[onnx]'") from None
        except (OSError, UserError):
            raise
        except Exception as error:  # exporters raise whatever they like
            raise UserError(f"{type(model).__name__} cannot be exported as {path.suffix}: {error}") from error
        # Half of the rows too: a file that only takes the example's number of rows is of no use.
        differences = [(read(example[:n]) - wanted[:n]).abs().max() for n in (len(example), max(1, len(example) // 2))]
    difference = float(max(differences))
    if not difference <= TOLERANCE * max(1.0, float(wanted.abs().max())):
        path.unlink()
        raise UserError(f"{path} would differ from the model by {difference:.2g}: it is not written")
    return difference


def _onnx(model: nn.Module, example: Tensor, path: Path) -> Callable[[Tensor], Tensor]:
    import onnxruntime
    import onnxscript as onnxscript  # what torch.onnx needs; asked for first, so that its lack is said plainly

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of the exporter to itself
        # The exporter warns for every operator of torchvision that is not there.
        said = logging.getLogger("torch.onnx")
        before = said.level
        said.setLevel(logging.ERROR)
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
            said.setLevel(before)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda x: torch.from_numpy(session.run(None, {"x": x.numpy()})[0])


def _pt2(model: nn.Module, example: Tensor, path: Path) -> Callable[[Tensor], Tensor]:
    made = torch.export.export(model, (example,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    torch.export.save(made, path)
    return torch.export.load(path).module()


def _safetensors(model: nn.Module, example: Tensor, path: Path) -> Callable[[Tensor], Tensor]:
    save_file({k: v.contiguous().clone() for k, v in model.state_dict().items()}, path)
    model.load_state_dict(load_file(path))
    return model


WRITERS: dict[str, Callable[[nn.Module, Tensor, Path], Callable[[Tensor], Tensor]]] = {
    ".onnx": _onnx,
    ".pt2": _pt2,
    ".safetensors": _safetensors,
}

"""Export a model to ONNX, torch.export or safetensors; the file does not depend on this project.

The file is read back and run, and its outputs must match those of the model. Otherwise the export fails. ONNX and
torch.export files contain the computation. A safetensors file has only weights: it is written if the network that they
are loaded into predicts the same with them.
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
from fedbn.nn.rows import mixing_layer

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


def export(
    model: nn.Module, example: Tensor, path: Path, *, fold: bool = False, plain: nn.Module | None = None
) -> float:
    """Write ``model`` in evaluation mode to a file; the suffix determines the format.

    Args:
        model: any model; for a `fedbn.online.Personalized`, the result of its ``export(user)``.
        example: input rows ``[n, *shape]``, at least 2. The file accepts any number of rows.
        path: ``.onnx`` (any ONNX runtime), ``.pt2`` (`torch.export.load`) or ``.safetensors`` (the state dict).
        fold: fold BN into the layers before it (`fold_batch_norm`).
        plain: network that the weights of a ``.safetensors`` file are loaded into, such as the user's own before a
            strategy replaced its layers; entries that it does not have are left out. None: the same class as ``model``.

    Returns:
        The largest absolute difference between the outputs of the file and of the model on the example.

    Raises:
        UserError: if the suffix is unknown, packages are missing, the model cannot be exported or mixes the rows of a
            batch, the outputs of the file differ from those of the model, or the weights do not fit ``plain`` or
            predict differently with it.
    """
    path = Path(path)
    if path.suffix not in WRITERS:
        raise unknown("suffix of an export", path.suffix or path.name, WRITERS)
    model = model.eval()
    if (where := mixing_layer(model, example)) is not None:
        raise UserError(
            f"{where} of {type(model).__name__} mixes the rows of a batch, so no file gives the same answers for other "
            "batches: give BN layers running statistics (track_running_stats=True) and train again"
        )
    with torch.no_grad():
        expected = model(example)
        written = fold_batch_norm(model) if fold else model
        if plain is not None and path.suffix == ".safetensors":
            require_same_predictions(model, plain, example)
            written = plain
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            exported = WRITERS[path.suffix](written, example, path)
        except ImportError as error:
            raise UserError(f"{path.suffix} needs packages ({error}): {install_extra('onnx')}") from None
        except (OSError, UserError):
            raise
        except Exception as error:  # exporters may raise any exception
            path.unlink(missing_ok=True)
            raise UserError(f"{type(model).__name__} cannot be exported as {path.suffix}: {error}") from error
        # Half of the rows too: the file must accept any number of rows.
        sizes = (len(example), max(1, len(example) // 2))
        differences = [(exported(example[:n]) - expected[:n]).abs().max() for n in sizes]
    difference = float(max(differences))
    if not _is_close(difference, expected):
        path.unlink()
        raise UserError(
            f"{path} would differ from the model by {difference:.2g}, so it was removed: "
            + ("export without folding" if fold else "use another suffix")
        )
    return difference


def require_same_predictions(model: nn.Module, plain: nn.Module, example: Tensor) -> None:
    """Load the weights of ``model`` into ``plain``, and raise unless it predicts the same.

    Args:
        model: the model in evaluation mode, possibly with layers that a strategy has replaced.
        plain: the network without them; gets the weights.
        example: input rows ``[n, *shape]``. Rows far from them are compared too, if the model accepts them.

    Raises:
        UserError: the weights do not fit, or the predictions differ; the message names the layers.
    """
    state = model.state_dict()
    try:
        plain.load_state_dict({k: state[k] for k in plain.state_dict() if k in state})
        plain.eval()
        same = _agree(model, plain, example) and _agree(model, plain, 3 * example + 1, optional=True)
    except RuntimeError:  # missing entries, or other shapes
        same = False
    if not same:
        modules = dict(plain.named_modules())
        others = {type(m).__name__ for p, m in model.named_modules() if type(m) is not type(modules.get(p))}
        raise UserError(
            "a .safetensors file has only weights, and they would not give the same predictions without the layers "
            f"that the strategy has put into {type(plain).__name__} ({', '.join(sorted(others))}): export to .pt2 or "
            ".onnx, which contain the layers"
        )


def _agree(model: nn.Module, plain: nn.Module, x: Tensor, *, optional: bool = False) -> bool:
    try:
        expected = model(x)
    except Exception:
        if optional:
            return True
        raise
    return _is_close(float((plain(x) - expected).abs().max()), expected)


def _is_close(difference: float, expected: Tensor) -> bool:
    return difference <= TOLERANCE * max(1.0, float(expected.abs().max()))


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

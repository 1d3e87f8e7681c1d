"""Lightning callback that converts normalization layers and recalibrates statistics (``fedbn[lightning]``).

Lightning is imported when a callback is created, because the import takes seconds.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fedbn.errors import UserError, install_extra
from fedbn.nn.conversion import convert, require_statistics
from fedbn.statistics.recalibration import recalibrate

if TYPE_CHECKING:
    from lightning.pytorch import Callback


def first_tensor(batch: Any) -> Tensor:
    """Inputs of a batch that is a tensor, or a sequence that starts with one.

    Raises:
        UserError: if the batch is neither.

    >>> first_tensor((torch.ones(2), "labels"))
    tensor([1., 1.])
    """
    inputs = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
    if not isinstance(inputs, Tensor):
        raise UserError(f"a batch is a {type(batch).__name__}: set normalization(inputs=...) to select its inputs")
    return inputs


def normalization(
    kind: str = "", *, rows: int = 4096, inputs: Callable[[Any], Tensor] = first_tensor, **options: object
) -> Callback:
    """Create a callback for `lightning.pytorch.Trainer`.

    Before a fit, and before the optimizers are created, `fedbn.nn.conversion.convert` converts the module's
    normalization layers to ``kind``. When training ends, `fedbn.statistics.recalibration.recalibrate` replaces the
    running averages with the exact moments of training inputs under the final weights. Checkpoints written before that
    contain the running averages.

    Args:
        kind: kind of normalization such as ``group``; empty to keep the layers.
        rows: minimum number of training inputs for recalibration (all, if there are fewer); 0 to skip it.
        inputs: function that maps a batch to the input of the module's ``forward``.
        **options: options of the kind, for example ``groups``.

    Raises:
        UserError: if Lightning is not installed. When the fit starts: if `fedbn.nn.conversion.convert` rejects the
            module or the options, the module has no running statistics to recalibrate, or there are several processes.
    """
    if rows < 0:
        raise UserError(f"rows must be 0 or more, not {rows}")
    try:
        callback = _callback_class()
    except ImportError as error:
        raise UserError(f"this needs Lightning ({error}): {install_extra('lightning')}") from None
    return callback(kind, rows, inputs, options)


@cache
def _callback_class() -> Callable[..., Callback]:
    from lightning.pytorch import Callback

    class Normalization(Callback):
        def __init__(self, kind: str, rows: int, inputs: Callable[[Any], Tensor], options: dict[str, object]) -> None:
            self.kind, self.rows, self.inputs, self.options = kind, rows, inputs, options
            self.converted: Any = None

        def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
            if stage != "fit":
                return
            if self.kind and self.converted is not pl_module:
                self.converted = convert(pl_module, self.kind, **self.options)
            if self.rows:
                require_statistics(pl_module, "recalibration after a fit (rows=0 skips it)")
                if trainer.world_size > 1:
                    raise UserError(
                        f"{trainer.world_size} processes would each use only their own data: set rows=0, and call "
                        "fedbn.statistics.recalibration.recalibrate on the finished model"
                    )

        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            parts: list[Tensor] = []
            for batch in trainer.train_dataloader if self.rows else ():
                parts.append(self.inputs(batch))
                if sum(map(len, parts)) >= self.rows:
                    break
            if parts:
                recalibrate(pl_module, torch.cat(parts).to(pl_module.device))

    return Normalization

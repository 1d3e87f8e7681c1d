"""Normalization in Lightning: convert layers before a fit, measure statistics exactly after it (``fedbn[lightning]``).

Lightning is imported when a callback is asked for: it takes seconds.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fedbn.errors import UserError
from fedbn.nn.conversion import convert, require_statistics
from fedbn.statistics.recalibration import recalibrate

if TYPE_CHECKING:
    from lightning.pytorch import Callback


def first(batch: Any) -> Tensor:
    """The inputs of a batch that is a tensor, or a sequence with them first.

    Raises:
        UserError: it is neither.

    >>> first((torch.ones(2), "labels"))
    tensor([1., 1.])
    """
    found = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
    if not isinstance(found, Tensor):
        raise UserError(f"a batch is a {type(batch).__name__}: tell normalization(inputs=...) where its inputs are")
    return found


def normalization(
    kind: str = "", *, rows: int = 4096, inputs: Callable[[Any], Tensor] = first, **options: object
) -> Callback:
    """A callback for `lightning.pytorch.Trainer`.

    Before a fit, `fedbn.nn.conversion.convert` turns the module's normalization layers into ``kind``, in time for its
    optimizers. When training ends, `fedbn.statistics.recalibration.recalibrate` replaces the running averages by the
    exact moments of training inputs under the final weights; checkpoints that were written before have the running
    averages.

    Args:
        kind: such as ``group``; empty: layers stay.
        rows: training inputs that are measured at least, if there are as many; 0: none.
        inputs: batch -> what the module's ``forward`` takes.
        **options: of the kind, for example ``groups``.

    Raises:
        UserError: Lightning is not installed; when the fit begins, whatever `fedbn.nn.conversion.convert` refuses,
            statistics to be measured that the module has not, or several processes, each of which would measure its own
            share.
    """
    if rows < 0:
        raise UserError(f"rows must be 0 or more, not {rows}")
    try:
        made = _kind()
    except ImportError as error:
        raise UserError(f"this needs Lightning ({error}): pip install 'fedbn[lightning]'") from None
    return made(kind, rows, inputs, options)


@cache
def _kind() -> Callable[..., Callback]:
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
                require_statistics(pl_module, "measuring statistics after a fit (rows=0 leaves it out)")
                if trainer.world_size > 1:
                    raise UserError(
                        f"{trainer.world_size} processes would each measure their own share: give rows=0, and call "
                        "fedbn.statistics.recalibration.recalibrate on the finished model"
                    )

        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            found: list[Tensor] = []
            for batch in trainer.train_dataloader if self.rows else ():
                found.append(self.inputs(batch))
                if sum(map(len, found)) >= self.rows:
                    break
            if found:
                recalibrate(pl_module, torch.cat(found).to(pl_module.device))

    return Normalization

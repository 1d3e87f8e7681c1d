"""Find computations in which the answer for a row depends on the other rows of its batch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from fedbn.nn.plain import copy_model

ROWS = 4
"""Number of rows beside which a row is computed."""

PLACE = 2
"""Rows before it; recurrent layers that take the batch for time mix a row only with those before."""


def mixing_layer(model: nn.Module, x: Tensor) -> str | None:
    """Where a model mixes the rows of a batch, in words; None if each row's answer is independent of the others.

    The first row is computed alone and between other rows, in the model's current mode. A difference is confirmed in
    float64, because rounding depends on the batch size. A model whose answers are random is not judged.

    Args:
        model: any model; it is not changed, except for statistics that it updates in its current mode.
        x: rows ``[n, *shape]``, at least one.

    >>> net = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3, track_running_stats=False)).eval()
    >>> mixing_layer(net, torch.ones(1, 2)), mixing_layer(net[:1], torch.ones(1, 2))
    ("layer '1' (BatchNorm1d)", None)
    """
    x = x.detach()
    with torch.no_grad():
        if not _mixes(model, x):
            return None
        try:
            exact, wide = copy_model(model).double(), x.double()
            exact(wide[:1].repeat(2, *[1] * (x.dim() - 1)))
        except Exception:  # a model that cannot be copied or that fixes its dtype is judged as it is
            exact, wide = model, x
        return _culprit(exact, wide) if _mixes(exact, wide) else None


def _mixes(model: nn.Module, x: Tensor) -> bool:
    try:
        alone, again = model(x[:1]), model(x[:1])
    except Exception:  # for example BN without running statistics, which needs two values per channel
        return _runs(model, x[:1].repeat(2, *[1] * (x.dim() - 1)))
    if not isinstance(alone, Tensor) or _differ(alone, again):
        return False
    for batch in _companies(x):
        try:
            beside = model(batch)
        except Exception:  # values that the model does not accept, such as unknown indices
            continue
        return beside.shape != (ROWS + 1, *alone.shape[1:]) or _differ(alone[0], beside[PLACE])
    return False


def _runs(model: nn.Module, x: Tensor) -> bool:
    try:
        model(x)
    except Exception:
        return False
    return True


def _companies(x: Tensor) -> Iterator[Tensor]:
    """Batches with the first row at `PLACE`, between rows far from it, or real rows if the model rejects those."""
    rows = x[torch.arange(ROWS, device=x.device) % len(x)]
    factors = torch.tensor([2.0, -3.0, 5.0, 10.0], device=x.device, dtype=x.dtype).view(-1, *[1] * (x.dim() - 1))
    for others in (factors * rows + factors, rows.flip(0)):
        yield torch.cat([others[:PLACE], x[:1], others[PLACE:]])


def _differ(a: Tensor, b: Tensor) -> bool:
    """Whether values differ by more than the rounding of batches of different sizes; False if ``a`` is not finite."""
    if not a.is_floating_point() or not a.numel() or not a.isfinite().all():
        return False
    return not bool(((a - b).abs() <= torch.finfo(a.dtype).eps ** 0.5 * a.abs().max()).all())


def _culprit(model: nn.Module, x: Tensor) -> str:
    """The first layer that gets the same row in both batches and answers differently."""
    paths = {module: path for path, module in model.named_modules()}
    try:
        with _recorded(model, 0) as alone:
            model(x[:1])
    except Exception:  # a layer that needs several rows ends the recording
        reached = [m for m in paths if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.running_mean is None]
        return _named(paths, reached[0]) if reached else "its forward pass"
    for batch in _companies(x):
        with _recorded(model, PLACE) as beside:
            if not _runs(model, batch):
                continue
        for (module, a_in, a_out), (other, b_in, b_out) in zip(alone, beside, strict=False):
            comparable = module is other and a_in.shape == b_in.shape and a_out.shape == b_out.shape
            if comparable and not _differ(a_in, b_in) and _differ(a_out, b_out):
                return _named(paths, module)
        break
    return "its forward pass"


def _named(paths: dict[nn.Module, str], module: nn.Module) -> str:
    path = paths[module]
    return f"layer {path!r} ({type(module).__name__})" if path else "its forward pass"


@contextmanager
def _recorded(model: nn.Module, row: int) -> Iterator[list[tuple[nn.Module, Tensor, Tensor]]]:
    """Modules in the order in which they finish, with one row of their input and output, or empty tensors."""
    calls: list[tuple[nn.Module, Tensor, Tensor]] = []

    def at(value: object) -> Tensor:
        found = isinstance(value, Tensor) and value.dim() and len(value) > row
        return value[row].clone() if found else torch.empty(0)  # type: ignore[index]

    def hook(module: nn.Module, args: tuple[object, ...], out: object) -> None:
        calls.append((module, at(args[0] if args else None), at(out)))

    handles = [module.register_forward_hook(hook) for module in model.modules()]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()

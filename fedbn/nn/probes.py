"""Measure how gradients grow from layer to layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import TracebackType

from torch import Tensor, nn

from fedbn.errors import UserError


@dataclass
class GradientGrowthProbe:
    r"""Record the outputs :math:`s_\ell` of some layers and the gradients of the loss with respect to them.

    The recorded values belong to the last forward and backward pass inside the ``with`` block: for each layer, the root
    mean square of :math:`\partial L/\partial s_\ell`, the standard deviation of :math:`s_\ell` and the share of
    :math:`|s_\ell| \le 1`.

    Attributes:
        layers: name -> module, in forward order; each must run once per pass.
        gradient: root mean square of the gradient.
        std: standard deviation of the output.
        unit_share: share of outputs in [-1, 1].

    >>> import torch
    >>> net = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    >>> with torch.no_grad():
    ...     for layer in net: _ = layer.weight.copy_(3 * torch.eye(2))
    >>> with GradientGrowthProbe(dict(net.named_children())) as probe:
    ...     net(torch.ones(4, 2)).sum().backward()
    >>> round(probe.growth, 4)
    3.0
    """

    layers: Mapping[str, nn.Module]
    gradient: dict[str, float] = field(default_factory=dict)
    std: dict[str, float] = field(default_factory=dict)
    unit_share: dict[str, float] = field(default_factory=dict)

    def __enter__(self) -> GradientGrowthProbe:
        if len(self.layers) < 2:
            raise UserError(f"gradient growth is measured between layers: pass at least two, not {len(self.layers)}")
        self._handles = [layer.register_forward_hook(self._forward_hook(name)) for name, layer in self.layers.items()]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()

    def _forward_hook(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def record_gradient(grad: Tensor) -> None:
            self.gradient[name] = float(grad.double().square().mean().sqrt())

        def hook(_module: nn.Module, _args: tuple[Tensor, ...], out: Tensor) -> None:
            s = out.detach().double()
            self.std[name], self.unit_share[name] = float(s.std()), float((s.abs() <= 1).double().mean())
            if out.requires_grad:
                out.register_hook(record_gradient)

        return hook

    @property
    def growth(self) -> float:
        """Geometric mean of the growth per layer *towards the input*: above 1 gradients explode, below 1 they vanish.

        Raises:
            UserError: there was no backward pass, or the gradient of the last layer is zero.
        """
        names = list(self.layers)
        first, last = (self.gradient.get(name, 0.0) for name in (names[0], names[-1]))
        if not last:
            raise UserError("no gradient has reached the layers: call backward() inside the with block")
        return (first / last) ** (1 / (len(names) - 1))

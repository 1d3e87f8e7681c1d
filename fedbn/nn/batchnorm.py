"""The batch and instance normalization classes of torch, independent of the number of dimensions."""

from __future__ import annotations

from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from fedbn.errors import UserError


class AnyInstanceNorm(_InstanceNorm):
    """Instance normalization of ``[N, C, *positions]``, whatever the number of position axes.

    Without positions (``[N, C]``) a sample has one value a channel and nothing to normalize by: refused.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Normalized activations, of the input's shape."""
        if input.dim() < 3:
            raise UserError(
                f"instance normalization needs [N, C, positions], got {list(input.shape)}: this model normalizes "
                "after a linear layer; choose groupnorm or layernorm"
            )
        return self._apply_instance_norm(input)


class AnyBatchNorm(_BatchNorm):
    """Batch normalization of ``[N, C, *positions]``, whatever the number of position axes."""

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"expected [N, C, *positions], got {list(input.shape)}")

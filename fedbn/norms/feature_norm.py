r"""Feature normalization (Zhang et al., TMLR 2024, https://arxiv.org/abs/2308.09565).

The input of the classifier is scaled to a fixed length,
:math:`\varphi \leftarrow \sqrt d\,\varphi/\lVert\varphi\rVert_2`. The authors find that this explains the benefit of
layer normalization under extreme label skew: it prevents feature collapse.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrize import is_parametrized

from fedbn.errors import UserError
from fedbn.nn.conversion import drop_norms
from fedbn.nn.roles import head_layer


def normalize_features(x: Tensor) -> Tensor:
    r"""Scale features ``[..., d]`` to length :math:`\sqrt d`.

    >>> import torch
    >>> normalize_features(torch.tensor([[0.0, 0.0, 0.0, 9.0]]))
    tensor([[0., 0., 0., 2.]])
    """
    return F.normalize(x, dim=-1) * x.shape[-1] ** 0.5


class FeatureNormLinear(nn.Linear):
    """A linear classifier that normalizes its input features ``[N, d]``."""

    def forward(self, input: Tensor) -> Tensor:
        """Logits ``[N, classes]``."""
        return super().forward(normalize_features(input))


def convert(model: nn.Module, *, keep_norms: bool = False) -> nn.Module:
    """Normalize features before the classifier, in place; names in the state dict do not change.

    Args:
        model: its last layer with weights must be linear.
        keep_norms: keep the normalization layers; by default they are removed.

    Raises:
        UserError: the last layer with weights is not linear, or is the model itself.

    >>> convert(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)))
    Sequential(
      (0): Linear(in_features=3, out_features=4, bias=True)
      (1): Identity()
      (2): FeatureNormLinear(in_features=4, out_features=2, bias=True)
    )
    """
    path, old = head_layer(model)
    if not path or not isinstance(old, nn.Linear) or is_parametrized(old):
        raise UserError(
            f"feature normalization needs a linear classifier inside the model, and {type(model).__name__} ends in "
            f"{type(old).__name__ if path else 'none'}: choose a model with one, or layernorm"
        )
    new = FeatureNormLinear(old.in_features, old.out_features, old.bias is not None)
    new.to(old.weight.device, old.weight.dtype).load_state_dict(old.state_dict())
    parent, _, leaf = path.rpartition(".")
    setattr(model.get_submodule(parent), leaf, new.train(old.training))
    return model if keep_norms else drop_norms(model)

r"""Domain-specific BN and batch normalization embeddings (BNE).

One network shares all parameters and has separate statistics for each domain (Chang et al., CVPR 2019,
https://arxiv.org/abs/1906.03950, here with one scale and shift for all domains). The statistics of domain :math:`d` are
its *embedding*. A sample of an unknown domain is compared with them by its instance statistics (Segu, Tonioni, Tombari,
2020, https://arxiv.org/abs/2011.12672):

.. math::
    D_d(x) = \sum_\ell \sum_c (m_c-\mu_{d,c})^2 + (s_c-\sigma_{d,c})^2,\qquad
    w_d \propto \frac1{D_d(x)+\epsilon},\qquad p(y \mid x) = \sum_d w_d(x)\,\mathrm{softmax}\,f_d(x),

where branch :math:`f_d` normalizes by the statistics of :math:`d`, and :math:`(m, s)` are computed in that branch. This
is a reconstruction from summaries: squared 2-Wasserstein distances, their sum over layers and the mixing of
probabilities were chosen here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedbn.errors import UserError
from fedbn.nn.conversion import convert_norms
from fedbn.nn.hooks import capture_inputs
from fedbn.nn.roles import State
from fedbn.norms.evalnorm import instance_statistics

Mix = Literal["probabilities", "logits"]


class DomainNorm(nn.Module):
    """BN of ``[N, C, *positions]`` with separate statistics for K domains and a shared scale and shift.

    ``running_mean`` and ``running_var`` are views of the current domain's row. So code that reads or writes the
    statistics of a BN layer does so for the current domain.

    Args:
        num_features: channels C.
        eps: added to the variance.
        momentum: weight of a batch in its domain's running statistics.
        affine: whether the layer has a scale and a shift.
        domains: number of domains K.

    >>> layer = DomainNorm(1, domains=2); layer.domain = 1
    >>> _ = layer(torch.tensor([[10.0], [30.0]])); layer.domain_mean.flatten().tolist()
    [0.0, 2.0]
    """

    normalizes = True
    domain_mean: Tensor
    domain_var: Tensor
    num_batches_tracked: Tensor

    def __init__(
        self, num_features: int, eps: float = 1e-5, momentum: float | None = 0.1, affine: bool = True, *, domains: int
    ) -> None:
        if domains < 1:
            raise UserError(f"domain-specific BN needs at least one domain, not domains={domains}")
        if momentum is None:
            raise UserError(
                "domain-specific BN does not support momentum=None: give the model's BN layers a momentum, e.g. 0.1"
            )
        super().__init__()
        self.num_features, self.eps, self.momentum, self.domains = num_features, eps, momentum, domains
        self.domain = 0
        self.weight = nn.Parameter(torch.ones(num_features)) if affine else None
        self.bias = nn.Parameter(torch.zeros(num_features)) if affine else None
        self.register_buffer("domain_mean", torch.zeros(domains, num_features))
        self.register_buffer("domain_var", torch.ones(domains, num_features))
        self.register_buffer("num_batches_tracked", torch.tensor(0))

    @property
    def running_mean(self) -> Tensor:
        """Statistics of the current domain, ``[C]``."""
        return self.domain_mean[self.domain]

    @property
    def running_var(self) -> Tensor:
        """Statistics of the current domain, ``[C]``."""
        return self.domain_var[self.domain]

    def forward(self, input: Tensor) -> Tensor:
        """Normalized activations, of the input's shape."""
        self.num_batches_tracked += self.training
        mean, var = self.running_mean, self.running_var
        return F.batch_norm(input, mean, var, self.weight, self.bias, self.training, self.momentum, self.eps)


def domain_layers(model: nn.Module) -> dict[str, DomainNorm]:
    """Domain-specific layers by path, in registration order."""
    return {p: m for p, m in model.named_modules() if isinstance(m, DomainNorm)}


def set_domain(model: nn.Module, domain: int) -> None:
    """Let every domain-specific layer of ``model`` use and update the statistics of ``domain``.

    Raises:
        UserError: unknown domain.
    """
    for layer in domain_layers(model).values():
        if not 0 <= domain < layer.domains:
            raise UserError(f"unknown domain {domain}: the model has {layer.domains} domains, counted from 0")
        layer.domain = domain


def register(model: nn.Module, embeddings: Sequence[State]) -> nn.Module:
    """Convert a BN model, in place, to one with a domain for each of ``embeddings``.

    Args:
        model: its normalization layers keep scale and shift.
        embeddings: for each domain, its statistics by the BN model's state names (``...running_mean``,
            ``...running_var``), for example the local statistics of SiloBN clients.

    >>> net = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    >>> statistics = {"1.running_mean": torch.ones(3), "1.running_var": torch.ones(3)}
    >>> register(net, [statistics, statistics])[1].domain_mean.shape
    torch.Size([2, 3])
    """
    convert(model, domains=len(embeddings))
    with torch.no_grad():
        for path, layer in domain_layers(model).items():
            for d, embedding in enumerate(embeddings):
                layer.domain_mean[d] = embedding[f"{path}.running_mean"]
                layer.domain_var[d] = embedding[f"{path}.running_var"]
    return model


def distance(mean: Tensor, var: Tensor, other_mean: Tensor, other_var: Tensor) -> Tensor:
    """Squared 2-Wasserstein distance between diagonal Gaussians, summed over the last axis.

    >>> float(distance(*(torch.tensor([v]) for v in (0.0, 1.0, 3.0, 4.0))))  # 3^2 + (1 - 2)^2
    10.0
    """
    return ((mean - other_mean) ** 2).sum(-1) + ((var.sqrt() - other_var.sqrt()) ** 2).sum(-1)


class BNE(nn.Module):
    """A model with domain-specific layers that mixes the domains' predictions by the distance of a sample to each.

    In evaluation the output for a sample does not depend on other samples. In training a batch comes from one domain.
    The branch of this domain normalizes by the batch and updates its statistics; the other branches stay in evaluation
    mode. The loss is that of the mixture. Train each domain separately first (`set_domain`), because initial running
    statistics are meaningless.

    Args:
        model: returns logits ``[N, classes]``.
        root: weight by distances instead of squared distances.
        mix: average probabilities or logits.

    >>> _ = torch.manual_seed(0)
    >>> net = nn.Sequential(nn.Conv1d(2, 3, 2), nn.BatchNorm1d(3), nn.Flatten(), nn.Linear(9, 2))
    >>> log_p, w = BNE(convert(net, domains=2)).eval()(torch.randn(5, 2, 4))
    >>> log_p.shape, w[0].tolist()  # two domains with equal statistics
    (torch.Size([5, 2]), [0.5, 0.5])
    """

    def __init__(self, model: nn.Module, *, root: bool = False, mix: Mix = "probabilities") -> None:
        super().__init__()
        if not domain_layers(model):
            raise UserError("BNE needs a model with domain-specific layers: convert(model, 'bne', domains=K)")
        self.model, self.root, self.mix = model, root, mix

    @property
    def domains(self) -> int:
        """Number of domains K."""
        return next(iter(domain_layers(self.model).values())).domains

    def forward(self, x: Tensor, domain: int | None = None) -> tuple[Tensor, Tensor]:
        """Log-probabilities ``[N, classes]`` and weights ``[N, K]`` of samples ``[N, ...]``.

        Args:
            x: samples.
            domain: the domain of the batch, in training.

        Raises:
            UserError: ``domain`` is missing in training, or no domain-specific layer has positions.
        """
        if self.training and domain is None:
            raise UserError("BNE trains on batches of one domain: pass it as model(x, domain=k)")
        branches = [self._branch(x, d, train=self.training and d == domain) for d in range(self.domains)]
        outputs, distances = (torch.stack(parts, 1) for parts in zip(*branches, strict=True))
        closeness = 1 / ((distances.sqrt() if self.root else distances) + 1e-8)
        weights = closeness / closeness.sum(1, keepdim=True)
        if self.mix == "logits":
            return F.log_softmax((weights.unsqueeze(2) * outputs).sum(1), 1), weights
        return torch.logsumexp(weights.log().unsqueeze(2) + F.log_softmax(outputs, 2), 1), weights

    def _branch(self, x: Tensor, domain: int, *, train: bool) -> tuple[Tensor, Tensor]:
        """Logits ``[N, classes]`` and distances ``[N]`` to ``domain``, computed in its branch."""
        set_domain(self.model, domain)
        layers = domain_layers(self.model)
        parts: list[Tensor] = []

        def add_distance(path: str, value: Tensor) -> None:
            if value.dim() > 2:  # without positions a sample has no variance
                layer = layers[path]
                parts.append(distance(*instance_statistics(value.detach()), layer.running_mean, layer.running_var))

        for layer in layers.values():
            layer.train(train)
        with capture_inputs(cast(dict[str, nn.Module], layers), add_distance):
            logits = self.model(x)
        if not parts:
            raise UserError(
                "BNE computes a sample's statistics over positions, and no domain-specific layer has any: use a "
                "convolutional model"
            )
        return logits, torch.stack(parts).sum(0)


def convert(model: nn.Module, *, domains: int) -> nn.Module:
    """Replace BN by domain-specific BN; each domain starts from the old statistics.

    >>> convert(nn.Sequential(nn.BatchNorm1d(4)), domains=3)[0].domain_mean.shape
    torch.Size([3, 4])
    """
    convert_norms(model, DomainNorm, "bne", domains=domains)
    with torch.no_grad():
        for layer in domain_layers(model).values():
            layer.domain_mean[:] = layer.domain_mean[0].clone()
            layer.domain_var[:] = layer.domain_var[0].clone()
    return model

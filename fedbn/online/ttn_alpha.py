r"""Post-training of TTN: how much of a batch's own statistics each channel should be normalized by.

Lim, Kim, Choo, Choi, 2023, *TTN: a domain-shift aware batch normalization in test-time adaptation*, ICLR,
https://arxiv.org/abs/2302.05155. With :math:`g_c` the gradient of the loss by a channel's scale and shift on a batch,
and :math:`g'_c` that on the batch under augmentation, a channel's sensitivity to shift and its weight's prior are

.. math:: d_c = 1 - \operatorname{mean}\frac{g_c\cdot g'_c}{\|g_c\|\|g'_c\|},\qquad
    A_c = \Big(\frac{d_c-\min d}{\max d-\min d}\Big)^2 .

From there the weights alone are trained, on cross-entropy of clean and augmented batches plus
:math:`\lambda\,\operatorname{mean}(\alpha-A)^2`, and kept in [0, 1]. Labeled source data are needed, and no target
data. What the paper takes for images is replaced here by changes of gain and noise; a batch is one user's windows, as
at test time.

Confirmed by the paper's abstract, the authors' page and a reader's notes: the model is frozen, sensitivity comes from
how alike the gradients of scale and shift are on clean and augmented data, it is the prior from which the weights are
trained on labeled source data, and they are fixed at test time. Not verified against the paper's text: that one cosine
joins the gradients of scale and shift, the scaling of d to [0, 1], its square, and the form of the penalty.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedbn.data.shift import Gain, Noise
from fedbn.errors import UserError
from fedbn.online.layer import Pass, scale_and_shift
from fedbn.online.personalized import personalize
from fedbn.online.prior import LayerPrior, layer_priors
from fedbn.online.rules.source import Source
from fedbn.online.statistics import Pair, mix

Batch = tuple[Tensor, Tensor]
"""Windows ``[n, *shape]`` of one user and their classes ``[n]``."""


def augmented(x: Tensor, draw: torch.Generator) -> Tensor:
    """Windows with other gains of their channels and more noise, one draw for all."""
    scale = x.transpose(0, 1).flatten(1).std(1)
    shape = tuple(x.shape[1:])
    for change in (Gain(), Noise()):
        x = change.draw(shape, scale, draw)(x)
    return x


def learn_alpha(
    model: nn.Module,
    batches: Sequence[Batch],
    draw: torch.Generator,
    *,
    epochs: int = 5,
    lr: float = 0.01,
    lam: float = 1.0,
    augment: Callable[[Tensor, torch.Generator], Tensor] = augmented,
) -> dict[str, LayerPrior]:
    """The model's running statistics with ``alpha``, for rule ``ttn``.

    Args:
        model: in evaluation mode; it is not touched.
        batches: labeled, each of one seen user, two windows at least.
        draw: of the augmentation.
        epochs: passes over the batches.
        lr: of Adam, on the weights.
        lam: weight of the distance to the prior.
        augment: what a shift looks like.

    Raises:
        UserError: no batches, or a batch of one window.
    """
    if not batches or min(len(y) for _, y in batches) < 2:
        raise UserError("ttn learns its weights from labeled batches of two windows at least: give some")
    net = personalize(model, Source(), capacity=1)
    bank = net.bank
    weight, bias = (t.clone().requires_grad_() for t in bank.affine)
    alpha = torch.zeros_like(weight)

    def loss(x: Tensor, y: Tensor) -> Tensor:
        def at(place: int, moments: Pair | None, positions: int) -> Pair:
            of = list(bank.spans.values())[place]
            assert moments is not None  # the pass watches
            joint = moments[0].mean(0), moments[1].mean(0) + moments[0].var(0, correction=0)
            mean, var = mix((bank.source.mean[0, of], bank.source.var[0, of]), joint, alpha[of])
            return tuple(t[None] for t in scale_and_shift(mean, var, bank.source.eps[of], weight[of], bias[of]))  # type: ignore[return-value]

        with Pass(len(x), at):
            return F.cross_entropy(net.model(x), y)

    def gradient(x: Tensor, y: Tensor) -> Tensor:
        return torch.stack(torch.autograd.grad(loss(x, y), (weight, bias)))

    net.requires_grad_(False)
    likeness = [F.cosine_similarity(gradient(x, y), gradient(augment(x, draw), y), dim=0) for x, y in batches]
    sensitivity = 1 - torch.stack(likeness).mean(0)
    spread = sensitivity.max() - sensitivity.min()
    prior = ((sensitivity - sensitivity.min()) / spread.clamp_min(1e-12)) ** 2
    alpha = prior.clone().requires_grad_()
    optimizer = torch.optim.Adam([alpha], lr)
    for _ in range(epochs):
        for x, y in batches:
            for windows in (x, augment(x, draw)):
                optimizer.zero_grad()
                (loss(windows, y) + lam * (alpha - prior).square().mean()).backward()
                optimizer.step()
                alpha.data.clamp_(0, 1)
    learnt = alpha.detach()
    return {path: replace(p, alpha=learnt[bank.spans[path]]) for path, p in layer_priors(model).items()}

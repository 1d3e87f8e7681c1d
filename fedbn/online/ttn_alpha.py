r"""Post-training of TTN: learns the weight of the batch statistics for each channel.

Lim, Kim, Choo, Choi, 2023, *TTN: a domain-shift aware batch normalization in test-time adaptation*, ICLR,
https://arxiv.org/abs/2302.05155. With :math:`g_c` the gradient of the loss by a channel's scale and shift on a batch,
and :math:`g'_c` that on the augmented batch, the sensitivity of a channel to shift and the prior of its weight are

.. math:: d_c = 1 - \operatorname{mean}\frac{g_c\cdot g'_c}{\|g_c\|\|g'_c\|},\qquad
    A_c = \Big(\frac{d_c-\min d}{\max d-\min d}\Big)^2 .

Starting from A, only the weights are trained, on the loss of clean and augmented batches plus
:math:`\lambda\,\operatorname{mean}(\alpha-A)^2`, and clipped to [0, 1]. This needs labeled source data but no target
data. The paper's image augmentations are replaced by changes of gain and noise. A batch consists of one user's windows,
as at test time.

Confirmed by the paper's abstract, the authors' page and a reader's notes: the model is frozen; the sensitivity compares
the gradients of scale and shift on clean and augmented data; it is the prior from which the weights are trained on
labeled source data; and they are fixed at test time. Not verified against the paper's text: the use of one cosine for
the gradients of scale and shift, the scaling of d to [0, 1], its square, and the form of the penalty.
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
from fedbn.optim.eager import eager

Batch = tuple[Tensor, Tensor]
"""Windows ``[n, *shape]`` of one user and their targets ``[n, ...]``."""


def gain_and_noise(x: Tensor, draw: torch.Generator) -> Tensor:
    """Augmentation: scale the channels and add noise, with one draw for all windows."""
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
    loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
    epochs: int = 5,
    lr: float = 0.01,
    lam: float = 1.0,
    augment: Callable[[Tensor, torch.Generator], Tensor] = gain_and_noise,
) -> dict[str, LayerPrior]:
    """Prior for rule ``ttn``: the model's running statistics with learned ``alpha``.

    Args:
        model: the source model in evaluation mode; it is not changed.
        batches: labeled batches of at least two windows, each of one seen user.
        draw: generator of the augmentation.
        loss: mean loss of outputs and targets.
        epochs: number of passes over the batches.
        lr: learning rate of Adam.
        lam: weight of the penalty on the distance from the prior.
        augment: augmentation that simulates a shift.

    Raises:
        UserError: no batches, or a batch of one window.
    """
    if not batches or min(len(y) for _, y in batches) < 2:
        raise UserError("ttn learns its weights from labeled batches of at least two windows: pass some")
    net = personalize(model, Source(), capacity=1)
    bank = net.bank
    weight, bias = (t.clone().requires_grad_() for t in bank.affine)
    alpha = torch.zeros_like(weight)
    runs = torch.zeros_like(weight, dtype=torch.bool)  # whether a channel's layer runs

    def objective(x: Tensor, y: Tensor) -> Tensor:
        def transform(index: int, moments: Pair | None, positions: int) -> Pair:
            span = list(bank.spans.values())[index]
            assert moments is not None  # the pass records them
            joint = moments[0].mean(0), moments[1].mean(0) + moments[0].var(0, correction=0)
            mean, var = mix((bank.source.mean[0, span], bank.source.var[0, span]), joint, alpha[span])
            scale, shift = scale_and_shift(mean, var, bank.source.eps[span], weight[span], bias[span])
            return scale[None], shift[None]

        with Pass(len(x), transform) as recorded:
            out = loss(net.model(x), y)
        for index in recorded.moments:
            runs[list(bank.spans.values())[index]] = True
        return out

    def gradient(x: Tensor, y: Tensor) -> Tensor:
        return torch.stack(torch.autograd.grad(objective(x, y), (weight, bias)))

    net.requires_grad_(False)
    similarity = [F.cosine_similarity(gradient(x, y), gradient(augment(x, draw), y), dim=0) for x, y in batches]
    sensitivity = 1 - torch.stack(similarity).mean(0)
    low, high = sensitivity[runs].min(), sensitivity[runs].max()
    prior = (((sensitivity - low) / (high - low).clamp_min(1e-12)) ** 2).where(runs, 0.0)
    alpha = prior.clone().requires_grad_()
    optimizer = eager(torch.optim.Adam)([alpha], lr)
    for _ in range(epochs):
        for x, y in batches:
            for windows in (x, augment(x, draw)):
                optimizer.zero_grad()
                (objective(windows, y) + lam * (alpha - prior).square().mean()).backward()
                optimizer.step()
                alpha.data.clamp_(0, 1)
    learned = alpha.detach()
    return {path: replace(p, alpha=learned[bank.spans[path]]) for path, p in layer_priors(model).items()}

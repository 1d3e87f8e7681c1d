"""Batch normalisation embeddings for domains never seen (Segu, Tonioni, Tombari).

Digits as five made-up cameras see them; one is left out of training in turn. The method is a reconstruction
(`fedbn.norms.bne`).
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedbn.layers import convert
from fedbn.models.small_cnn import SmallCNN
from fedbn.norms.bne import BNE, set_domain
from fedbn.scenario import Examples
from fedbn.seeds import generator
from simulations.claims import Claim
from simulations.claims.bench import DIGITS, accuracy, digits, seeded, shuffled, train

DOMAINS = ("as it is", "low contrast", "noise", "blur", "bright")
ROWS = 260


def seen_by(domain: str, x: Tensor, draw: torch.Generator) -> Tensor:
    """Images ``[n, 1, 8, 8]`` in 0 to 1 as a domain's camera sees them."""
    match domain:
        case "low contrast":
            return 0.3 * x + 0.35
        case "noise":
            return x + 0.3 * torch.randn(x.shape, generator=draw)
        case "blur":
            return F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, 1)
        case "bright":
            return x.sqrt() + 0.5
        case _:
            return x


def _worlds(seed: int) -> tuple[dict[str, Examples], dict[str, Examples]]:
    """Training data of every domain, no image in two of them, and the whole test set as each sees it."""
    data, test = digits(seed)
    draw = generator(seed, "claims", "cameras")
    own = {d: data.take(torch.arange(i * ROWS, (i + 1) * ROWS)) for i, d in enumerate(DOMAINS)}
    trains = {d: Examples(seen_by(d, e.x, draw), e.y, e.recording) for d, e in own.items()}
    return trains, {d: Examples(seen_by(d, test.x, draw), test.y, test.recording) for d in DOMAINS}


def _branches(sources: list[Examples], epochs: int, seed: int, *, mixed: bool) -> BNE:
    """Shared weights, statistics per domain; batches of one domain each, in turn.

    Args:
        sources: data of each domain.
        epochs: over all of them.
        seed: of weights and batches.
        mixed: in the second half of the epochs, minimise the loss of the mixture that is used in the end.
    """
    with seeded(seed, "weights"):
        model = convert(SmallCNN((1, 8, 8), 10), "bne", domains=len(sources))
    mixture = BNE(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    orders = [list(shuffled(len(data), 32, epochs, seed + i)) for i, data in enumerate(sources)]
    for step, rows in enumerate(zip(*orders, strict=True)):
        for domain, data in enumerate(sources):
            if mixed and 2 * step >= len(orders[0]):
                optimizer.zero_grad()
                log_p, _ = mixture.train()(data.x[rows[domain]], domain=domain)
                F.nll_loss(log_p, data.y[rows[domain]]).backward()
                optimizer.step()
            else:
                set_domain(model, domain)
                train(model, data, [rows[domain]], optimizer)
    return mixture.eval()


def unseen(arm: str, seed: int, quick: bool) -> dict[str, float]:
    """Mean accuracy on the domains left out, two of them in a quick run."""
    trains, tests = _worlds(seed)
    found = []
    for away in DOMAINS[2:4] if quick else DOMAINS:
        sources = [trains[d] for d in DOMAINS if d != away]
        test, epochs = tests[away], 8 if quick else 20
        if arm == "pooled BN":
            with seeded(seed, "weights"):
                model: nn.Module = SmallCNN((1, 8, 8), 10)
            pooled = Examples.concat(sources)
            optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
            found.append(accuracy(train(model, pooled, shuffled(len(pooled), 32, epochs, seed), optimizer), test))
            continue
        mixture = _branches(sources, epochs, seed, mixed=arm == "trained as mixture")
        with torch.no_grad():
            p = mixture(test.x)[0].exp()
            if arm == "uniform":
                p = torch.zeros_like(p)
                for domain in range(len(sources)):
                    set_domain(mixture.model, domain)
                    p += mixture.model(test.x).softmax(1)
        found.append(float((p.argmax(1) == test.y).double().mean()))
    return {"accuracy": sum(found) / len(found)}


claim = partial(
    Claim,
    source="Segu, Tonioni, Tombari 2020, https://arxiv.org/abs/2011.12672",
    setting=f"{DIGITS}; five made-up cameras, one left out in turn; small-cnn",
    published="not verified",
    run=unseen,
    measure="accuracy",
)

CLAIMS = (
    claim(
        name="bne-weights",
        sentence="Branches weighted by where a sample lies beat the same branches weighted alike.",
        arms=("weighted", "uniform"),
        effect=lambda v: v["weighted"] - v["uniform"],
        meaning="accuracy on unseen domains, weighted minus uniform",
        threshold=0.0,
    ),
    claim(
        name="bne-pooled",
        sentence="Branches trained as the mixture that they are in the end beat one BN for all domains.",
        arms=("trained as mixture", "pooled BN", "weighted"),
        effect=lambda v: v["trained as mixture"] - v["pooled BN"],
        meaning="accuracy on unseen domains, trained as mixture minus one BN",
        threshold=0.0,
    ),
)

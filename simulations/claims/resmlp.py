"""Dropout, BN and skips make an MLP trainable (Kim).

The author's gender model and hyper-parameters on synthetic 512-dimensional embeddings, as faces are not at hand: two
classes, each a mixture of 20 Gaussians around random directions.
"""

from __future__ import annotations

from functools import partial

import torch

from fedbn.models.resmlp import ResMLP
from fedbn.scenario import Examples
from fedbn.seeds import generator
from simulations.claims import Claim
from simulations.claims.bench import accuracy, seeded, shuffled, train


def embeddings(seed: int, rows: int) -> tuple[Examples, Examples]:
    """Training and as many test rows ``[rows, 512]`` of unit length."""
    draw = generator(seed, "claims", "embeddings")
    centres = torch.randn(40, 512, generator=draw)
    group = torch.randint(40, (2 * rows,), generator=draw)
    x = centres[group] + 2.5 * torch.randn(2 * rows, 512, generator=draw)
    everything = Examples(torch.nn.functional.normalize(x), group % 2, torch.zeros_like(group))
    return everything.take(torch.arange(rows)), everything.take(torch.arange(rows, 2 * rows))


def learning(arm: str, seed: int, quick: bool) -> dict[str, float]:
    """Test accuracy with the author's optimiser: AdamW, batches of 512, the rate times 0.066 after every epoch."""
    data, test = embeddings(seed, 4096 if quick else 8192)
    with seeded(seed, "weights"):
        model = ResMLP((512,), 2, ic="IC" in arm, skip="skip" in arm)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0243983, weight_decay=0.0047354)
    steps = len(data) // 512
    with seeded(seed, "dropout"):
        for epoch in range(3 if quick else 5):
            for group in optimizer.param_groups:
                group["lr"] = 0.0243983 * 0.0662042**epoch
            train(model, data, list(shuffled(len(data), 512, epoch + 1, seed))[-steps:], optimizer)
    return {"accuracy": accuracy(model, test)}


claim = partial(
    Claim,
    source="Kim 2021, https://arxiv.org/abs/2108.08186",
    setting="synthetic 512-d embeddings, 40 Gaussians; the author's gender model and hyper-parameters",
    run=learning,
    measure="accuracy",
)

CLAIMS = (
    claim(
        name="resmlp-ic-skip",
        sentence="Trained from scratch, IC layers with skips beat the plain MLP.",
        published="Adience gender from scratch: .8406 with IC and skip, .5847 plain (mean over 25 runs, author's log)",
        arms=("IC + skip", "plain"),
        effect=lambda v: v["IC + skip"] - v["plain"],
        meaning="test accuracy, IC and skip minus plain",
        threshold=0.05,
    ),
    claim(
        name="resmlp-skip-on-top",
        sentence="Skips add to what IC layers bring.",
        published="Adience gender from scratch: .8406 with IC and skip, .8340 IC only (author's log)",
        arms=("IC + skip", "IC"),
        effect=lambda v: v["IC + skip"] - v["IC"],
        meaning="test accuracy, IC and skip minus IC only",
        threshold=0.0,
    ),
    claim(
        name="resmlp-ic-on-top",
        sentence="IC layers add to what skips bring.",
        published="Adience gender from scratch: .8406 with IC and skip, .8207 skip only (author's log)",
        arms=("IC + skip", "skip"),
        effect=lambda v: v["IC + skip"] - v["skip"],
        meaning="test accuracy, IC and skip minus skip only",
        threshold=0.0,
    ),
)

"""Dropout, BN and skip connections make an MLP trainable (Kim).

The author's gender model and hyper-parameters on synthetic 512-dimensional embeddings instead of faces: two classes,
each a mixture of 20 Gaussians around random directions. Then the same four networks with two blocks on real tables:
breast cancer, wine and digits from scikit-learn, and HAPT windows (mean, standard deviation, minimum, maximum and mean
change of each channel), tested on unseen people.
"""

from __future__ import annotations

from functools import cache, partial

import torch
from torch import Tensor

from fedbn.data.population import Examples
from fedbn.models.resmlp import ResMLP
from fedbn.scenarios.base import scenario
from fedbn.seeds import generator
from fedbn_simulations.claims.claim import Claim
from fedbn_simulations.claims.studies.common import accuracy, seeded, shuffled, train

NUMERICS = 1


def embeddings(seed: int, rows: int) -> tuple[Examples, Examples]:
    """Training and test data ``[rows, 512]`` of unit norm."""
    rng = generator(seed, "claims", "embeddings")
    centers = torch.randn(40, 512, generator=rng)
    group = torch.randint(40, (2 * rows,), generator=rng)
    x = centers[group] + 2.5 * torch.randn(2 * rows, 512, generator=rng)
    data = Examples(torch.nn.functional.normalize(x), group % 2, torch.zeros_like(group))
    return data.take(torch.arange(rows)), data.take(torch.arange(rows, 2 * rows))


def learning(arm: str, seed: int, quick: bool) -> dict[str, float]:
    """Test accuracy with the author's optimizer: AdamW, batches of 512, rate multiplied by 0.066 after every epoch."""
    data, test = embeddings(seed, 4096)
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


def features(windows: Tensor) -> Tensor:
    """Mean, standard deviation, minimum, maximum and mean absolute change per channel of ``[n, channels, samples]``.

    >>> features(torch.tensor([[[0.0, 2.0, 4.0]]])).tolist()
    [[2.0, 2.0, 0.0, 4.0, 2.0]]
    """
    changes = windows.diff(dim=2).abs().mean(2)
    statistics = [windows.mean(2), windows.std(2), windows.amin(2), windows.amax(2), changes]
    return torch.stack(statistics, 2).flatten(1)


@cache
def _table(name: str, seed: int) -> tuple[Examples, Examples]:
    """Training and test rows of a table, standardized with the training rows."""
    if name == "hapt":
        population = scenario("hapt").load(seed)
        groups = [
            Examples.concat([population.users[i].train for i in users])
            for users in (population.seen, population.unseen)
        ]
        train_rows, test_rows = (Examples(features(g.x), g.y, g.recording) for g in groups)
    else:
        users = scenario(f"tabular:table={name}:dealt=random:unseen=0").load(0).users
        rows = Examples.concat([examples for u in users for examples in (u.train, u.test)])
        order = torch.randperm(len(rows), generator=generator(seed, "claims", "table", name))
        cut = 3 * len(rows) // 4
        train_rows, test_rows = rows.take(order[:cut]), rows.take(order[cut:])
    mean, std = train_rows.x.mean(0), train_rows.x.std(0).clamp_min(1e-6)
    return (
        Examples((train_rows.x - mean) / std, train_rows.y, train_rows.recording),
        Examples((test_rows.x - mean) / std, test_rows.y, test_rows.recording),
    )


def tables(arm: str, seed: int, quick: bool) -> dict[str, float]:
    """Test accuracy on each table and their mean, with AdamW 0.001 and batches of 32."""
    accuracies = {}
    for name in TABLES:
        data, test = _table(name, seed)
        with seeded(seed, "weights"):
            classes = int(data.y.max()) + 1
            model = ResMLP((data.x.shape[1],), classes, blocks=2, ic="IC" in arm, skip="skip" in arm)
        # The same number of steps on each table.
        epochs = max(1, (100 if quick else 300) // (len(data) // 32))
        with seeded(seed, "dropout"):
            train(model, data, shuffled(len(data), 32, epochs, seed), torch.optim.AdamW(model.parameters(), lr=1e-3))
        accuracies[f"accuracy on {name}"] = accuracy(model, test)
    return accuracies | {"mean accuracy": sum(accuracies.values()) / len(accuracies)}


TABLES = ("breast-cancer", "wine", "digits", "hapt")
claim = partial(
    Claim,
    source="Kim 2021, https://arxiv.org/abs/2108.08186",
    setting="synthetic 512-d embeddings, 40 Gaussians; the author's gender model and hyper-parameters",
    run=learning,
    measure="accuracy",
    arms=("IC + skip", "IC", "skip", "plain"),
    threshold=0.0,
)
on_tables = partial(
    claim,
    published="no such data in the paper",
    setting="breast-cancer, wine, digits, and HAPT's features with 6 unseen people; two blocks, 300 steps of AdamW",
    run=tables,
    measure="mean accuracy",
)

CLAIMS = (
    claim(
        name="resmlp-ic-skip",
        sentence="Trained from scratch, an MLP with IC layers and skips beats the plain MLP.",
        published="Adience gender from scratch: .8406 with IC and skip, .5847 plain (mean over 25 runs, author's log)",
        effect=lambda v: v["IC + skip"] - v["plain"],
        meaning="test accuracy, IC and skip minus plain",
        threshold=0.05,
    ),
    claim(
        name="resmlp-skip-on-top",
        sentence="Skips improve an MLP with IC layers.",
        published="Adience gender from scratch: .8406 with IC and skip, .8340 IC only (author's log)",
        effect=lambda v: v["IC + skip"] - v["IC"],
        meaning="test accuracy, IC and skip minus IC only",
    ),
    claim(
        name="resmlp-ic-on-top",
        sentence="IC layers improve an MLP with skips.",
        published="Adience gender from scratch: .8406 with IC and skip, .8207 skip only (author's log)",
        effect=lambda v: v["IC + skip"] - v["skip"],
        meaning="test accuracy, IC and skip minus skip only",
    ),
    on_tables(
        name="resmlp-tables",
        sentence="On real tables, an MLP with IC layers and skips also beats the plain MLP.",
        effect=lambda v: v["IC + skip"] - v["plain"],
        meaning="mean test accuracy over four tables, IC and skip minus plain",
    ),
    on_tables(
        name="resmlp-tables-ic",
        sentence="On real tables, IC layers improve accuracy more than skips.",
        source="our question, after Kim 2021, https://arxiv.org/abs/2108.08186",
        effect=lambda v: v["IC"] - v["skip"],
        meaning="mean test accuracy over four tables, IC only minus skip only",
    ),
    on_tables(
        name="resmlp-hapt",
        sentence="On unseen people, an MLP with IC layers and skips beats the plain MLP.",
        measure="accuracy on hapt",
        effect=lambda v: v["IC + skip"] - v["plain"],
        meaning="test accuracy on features of six unseen people, IC and skip minus plain",
    ),
)

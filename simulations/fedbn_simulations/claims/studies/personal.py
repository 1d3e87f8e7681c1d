"""Online domain-adaptive BN for activity recognition (Mazankiewicz, Boehm, Berges).

Real people, with a phone at the waist or a watch at the wrist. Some are unseen and are processed window by window,
without labels. Training normalizes batches of one user each and has running statistics per user; an unseen user starts
from their mean. As in the authors' released code, the mean variance ignores differences between users' means.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache, partial
from typing import cast

import torch
from torch import nn

from fedbn.data.population import Examples, Population
from fedbn.models import build
from fedbn.nn.conversion import convert
from fedbn.nn.roles import statistics_layers
from fedbn.norms.bne import domain_layers, set_domain
from fedbn.online import personalize
from fedbn.online.rules.base import rule
from fedbn.scenarios.base import scenario
from fedbn.seeds import generator
from fedbn_simulations.claims.claim import Claim
from fedbn_simulations.claims.studies.common import accuracy, shuffled, train

NUMERICS = 1


@cache
def _population(name: str, seed: int) -> Population:
    return scenario(name).load(seed)


def one_user_a_batch(data: Examples, sizes: list[int], epochs: int, seed: int) -> Iterator[torch.Tensor]:
    """Batches of 32 rows of a single user each, in shuffled order."""
    for epoch in range(epochs):
        rng = generator(seed, "claims", "one user a batch", epoch)
        rows = torch.arange(len(data)).split(sizes)
        batches = [b for user_rows in rows for b in user_rows[torch.randperm(len(user_rows), generator=rng)].split(32)]
        for i in torch.randperm(len(batches), generator=rng).tolist():
            if len(batches[i]) == 32:
                yield batches[i]


def train_by_user(model: nn.Module, users: list[Examples], epochs: int, seed: int) -> nn.Module:
    """Train ``model`` on batches of one user each; its statistics are the mean of those of the users.

    Args:
        model: model with BN layers.
        users: training data of each user.
        epochs: number of epochs over all users.
        seed: random seed of the order of batches.
    """
    data, sizes = Examples.concat(users), [len(u) for u in users]
    user_of_row = torch.arange(len(users)).repeat_interleave(torch.tensor(sizes))
    convert(model, "bne", domains=len(users))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    trained: set[int] = set()
    for rows in one_user_a_batch(data, sizes, epochs, seed):
        user = int(user_of_row[rows[0]])
        trained.add(user)
        set_domain(model, user)
        train(model, data, [rows], optimizer)
    selected = torch.tensor(sorted(trained))  # a user with less than a batch has no statistics
    means = {
        path: (layer.domain_mean[selected].mean(0), layer.domain_var[selected].mean(0))
        for path, layer in domain_layers(model).items()
    }
    convert(model, "batch")
    for path, layer in statistics_layers(model).items():
        bn = cast(nn.BatchNorm1d, layer)
        bn.running_mean, bn.running_var = means[path]
    return model


def _unseen_accuracy(population: Population, arm: str, seed: int, epochs: int) -> dict[str, float]:
    """Mean accuracy on unseen people; the arm is the training: ``frozen`` (ordinary BN) or ``by user``."""
    users = [population.users[i].train for i in population.seen]
    model = build("har-cnn", population.shape, len(population.classes), seed)
    streams = [population.users[i].test for i in population.unseen]
    if arm == "frozen":
        data = Examples.concat(users)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
        train(model, data, shuffled(len(data), 32, epochs, seed), optimizer)
        return {"accuracy: frozen": sum(accuracy(model, s) for s in streams) / len(streams)}
    model = train_by_user(model, users, epochs, seed).eval()
    shuffled_streams = [
        s.take(torch.randperm(len(s), generator=generator(seed, "claims", "stream", i)))
        for i, s in zip(population.unseen, streams, strict=True)
    ]
    return {
        "accuracy: mean of users": sum(accuracy(model, s) for s in streams) / len(streams),
        "accuracy: natural stream": _online_accuracy(model, streams),
        "accuracy: shuffled stream": _online_accuracy(model, shuffled_streams),
    }


def _online_accuracy(model: nn.Module, streams: list[Examples]) -> float:
    """Mean accuracy over users with statistics that are updated on each user's stream, window by window."""
    net = personalize(model, rule("dabn:rate=0.02"))
    correct = torch.zeros(len(streams))
    with torch.no_grad():
        for t in range(max(map(len, streams))):
            users = [u for u, s in enumerate(streams) if t < len(s)]
            predicted = net(torch.stack([streams[u].x[t] for u in users]), user=users).argmax(1)
            correct[users] += (predicted == torch.stack([streams[u].y[t] for u in users])).float()
    return float((correct / torch.tensor([len(s) for s in streams])).mean())


def phone(arm: str, seed: int, quick: bool) -> dict[str, float]:
    """Accuracies on the later recordings of six people with a phone."""
    return _unseen_accuracy(_population("hapt", seed), arm, seed, 2 if quick else 6)


def watch(arm: str, seed: int, quick: bool) -> dict[str, float]:
    """Accuracies on the second halves of the recordings of two people with a watch on either arm."""
    return _unseen_accuracy(_population("watch", seed), arm, seed, 4 if quick else 12)


ABSTRACT = "44 people, median improvement 4 %, up to 14 % (abstract"
online = partial(
    Claim,
    source="Mazankiewicz, Böhm, Bergés 2020, https://arxiv.org/abs/2005.12178",
    arms=("frozen", "shuffled stream", "natural stream", "mean of users"),
    measure="accuracy",
    threshold=0.0,
    trained=lambda arm: "frozen" if arm == "frozen" else "by user",
)
with_phones = partial(online, setting="HAPT, 24 seen and 6 unseen people; har-cnn, weight per window 0.02", run=phone)
with_watches = partial(
    online, setting="watch, 16 arms of 8 seen and 4 arms of 2 unseen people; har-cnn, weight per window 0.02", run=watch
)

CLAIMS = tuple(
    study_claim
    for suffix, claim in (("", with_phones), ("-watch", with_watches))
    for study_claim in (
        claim(
            name=f"dabn-mixed-stream{suffix}",
            sentence="Online DA-BN is more accurate on unseen people than frozen BN if activities are mixed.",
            published=f"{ABSTRACT})",
            effect=lambda v: v["shuffled stream"] - v["frozen"],
            meaning="mean accuracy on unseen people, DA-BN on a shuffled stream minus frozen BN",
        ),
        claim(
            name=f"dabn-natural-stream{suffix}",
            sentence="Online DA-BN is more accurate on unseen people than frozen BN if activities are as recorded.",
            published=f"{ABSTRACT}; the order of the stream was not verified)",
            effect=lambda v: v["natural stream"] - v["frozen"],
            meaning="mean accuracy on unseen people, DA-BN on the recorded stream minus frozen BN",
        ),
        claim(
            name=f"dabn-order-matters{suffix}",
            sentence="Online DA-BN loses accuracy if activities are in recorded order instead of mixed.",
            published="not in the parts of the paper that were read",
            effect=lambda v: v["shuffled stream"] - v["natural stream"],
            meaning="mean accuracy on unseen people, shuffled minus recorded stream",
        ),
    )
)

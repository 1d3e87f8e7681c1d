"""Online domain-adaptive BN for activity recognition (Mazankiewicz, Boehm, Berges).

Real people with a phone at the waist; six of thirty never train and are met window by window, without labels.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache, partial

import torch

from fedbn.models import build
from fedbn.online import personalize, rule
from fedbn.scenario import Examples, Population, scenario
from fedbn.seeds import generator
from fedbn.training import logits
from simulations.claims import Claim
from simulations.claims.bench import shuffled, train


@cache
def _people(seed: int) -> Population:
    return scenario("hapt").load(seed)


def one_user_a_batch(data: Examples, sizes: list[int], epochs: int, seed: int) -> Iterator[torch.Tensor]:
    """Batches of 32 rows of a single user each, in shuffled order."""
    for epoch in range(epochs):
        draw = generator(seed, "claims", "one user a batch", epoch)
        rows = torch.arange(len(data)).split(sizes)
        parts = [part for own in rows for part in own[torch.randperm(len(own), generator=draw)].split(32)]
        for i in torch.randperm(len(parts), generator=draw).tolist():
            if len(parts[i]) == 32:
                yield parts[i]


def deployed(arm: str, seed: int, quick: bool) -> dict[str, float]:
    """Mean accuracy on the unseen people; the arm says whether statistics follow them, and in which order they come.

    ``frozen`` is ordinary BN trained on mixed batches.
    """
    people = _people(seed)
    parts = [people.users[i].train for i in people.seen]
    data, epochs = Examples.concat(parts), 2 if quick else 8
    model = build("har-cnn", people.shape, len(people.classes), seed)
    order = (
        shuffled(len(data), 32, epochs, seed)
        if arm == "frozen"
        else one_user_a_batch(data, list(map(len, parts)), epochs, seed)
    )
    train(model, data, order, torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9))
    model.eval()
    streams = []
    for i in people.unseen:
        test = people.users[i].test
        mixed = torch.randperm(len(test), generator=generator(seed, "claims", "stream", i))
        streams.append(test.take(mixed) if arm == "shuffled stream" else test)
    if arm == "frozen":
        right = [(logits(model, s.x).argmax(1) == s.y).double().mean() for s in streams]
        return {"accuracy": float(torch.stack(right).mean())}
    net = personalize(model, rule("dabn:rate=0.02"))
    counts = torch.zeros(len(streams))
    with torch.no_grad():
        for t in range(max(map(len, streams))):
            here = [u for u, s in enumerate(streams) if t < len(s)]
            answers = net(torch.stack([streams[u].x[t] for u in here]), user=here).argmax(1)
            counts[here] += (answers == torch.stack([streams[u].y[t] for u in here])).float()
    return {"accuracy": float((counts / torch.tensor([len(s) for s in streams])).mean())}


claim = partial(
    Claim,
    source="Mazankiewicz, Böhm, Bergés 2020, https://arxiv.org/abs/2005.12178",
    setting="HAPT, 24 people train and 6 are unseen; har-cnn, weight of a window 0.02",
    run=deployed,
    measure="accuracy",
)

CLAIMS = (
    claim(
        name="dabn-mixed-stream",
        sentence="Online DA-BN is more accurate on unseen people than frozen BN when activities come mixed.",
        published="44 people, median improvement 4 %, up to 14 % (abstract)",
        arms=("shuffled stream", "frozen"),
        effect=lambda v: v["shuffled stream"] - v["frozen"],
        meaning="mean accuracy of unseen people, DA-BN on a shuffled stream minus frozen BN",
        threshold=0.0,
    ),
    claim(
        name="dabn-natural-stream",
        sentence="Online DA-BN is more accurate on unseen people than frozen BN as activities really come.",
        published="44 people, median improvement 4 %, up to 14 % (abstract; the order of the stream was not read)",
        arms=("natural stream", "frozen"),
        effect=lambda v: v["natural stream"] - v["frozen"],
        meaning="mean accuracy of unseen people, DA-BN on the recorded stream minus frozen BN",
        threshold=0.0,
    ),
    claim(
        name="dabn-order-matters",
        sentence="Online DA-BN loses accuracy when activities come in bouts instead of mixed.",
        published="not in the paper, as far as read",
        arms=("shuffled stream", "natural stream"),
        effect=lambda v: v["shuffled stream"] - v["natural stream"],
        meaning="mean accuracy of unseen people, shuffled minus recorded stream",
        threshold=0.0,
    ),
)

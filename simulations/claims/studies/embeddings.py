"""Batch normalization embeddings for domains never seen (Segu, Tonioni, Tombari).

Digits of six domains; one is left out of training in turn. The method is a reconstruction (`fedbn.norms.bne`). Beside
it, from the same training where they can: the uniform ensemble of its branches; DSBN, whose branch for the new domain
takes its statistics from that domain's unlabeled images; one BN for all domains, as it is and with statistics of the
new domain (AdaBN). In federation each domain is a client that keeps its statistics (SiloBN), and one that never
trained is placed among them.
"""

from __future__ import annotations

import copy
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from fedbn.data.population import Examples
from fedbn.federation.run import Run, plan_for
from fedbn.federation.setup import build_context
from fedbn.models.small_cnn import SmallCNN
from fedbn.nn.conversion import convert
from fedbn.norms.bne import BNE, register, set_domain
from fedbn.statistics.recalibration import recalibrate
from simulations.claims.claim import Claim
from simulations.claims.studies.common import DOMAINS, SIX, accuracy, digit_domains, seeded, shuffled, train
from simulations.engines.execute import execute

NUMERICS = 1
"""Version of this study's numbers; raise it when a change here changes results."""


def _network(seed: int) -> SmallCNN:
    with seeded(seed, "weights"):
        return SmallCNN((3, 14, 14), 10)


def _branches(sources: list[Examples], epochs: int, seed: int, *, mixed: bool) -> BNE:
    """Shared weights, statistics per domain; batches of one domain each, in turn.

    Args:
        sources: data of each domain.
        epochs: over all of them.
        seed: of weights and batches.
        mixed: in the last quarter of the epochs, minimize the loss of the mixture that is used in the end.
    """
    model = convert(_network(seed), "bne", domains=len(sources))
    mixture = BNE(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    orders = [list(shuffled(len(data), 32, epochs, seed + i)) for i, data in enumerate(sources)]
    for step, rows in enumerate(zip(*orders, strict=True)):
        for domain, data in enumerate(sources):
            if mixed and 4 * step >= 3 * len(orders[0]):
                optimizer.zero_grad()
                log_p, _ = mixture.train()(data.x[rows[domain]], domain=domain)
                F.nll_loss(log_p, data.y[rows[domain]]).backward()
                optimizer.step()
            else:
                set_domain(model, domain)
                train(model, data, [rows[domain]], optimizer)
    return mixture.eval()


def probabilities(mixture: BNE, x: Tensor, *, uniform: bool) -> Tensor:
    """What the branches say of ``x`` ``[n, ...]``, ``[n, classes]``: each weighed by where a sample lies, or alike."""
    mixture.eval()
    with torch.no_grad():
        if not uniform:
            return mixture(x)[0].exp()
        parts = []
        for domain in range(mixture.domains):
            set_domain(mixture.model, domain)
            parts.append(mixture.model(x).softmax(1))
        return torch.stack(parts).mean(0)


def _share_right(p: Tensor, test: Examples) -> float:
    return float((p.argmax(1) == test.y).double().mean())


def unseen(arm: str, seed: int, quick: bool) -> dict[str, float]:
    """Mean accuracy on the domains left out; two of them, by the seed, in a quick run.

    The arm is what is trained: one BN for all, branches each by itself, or branches as a mixture.
    """
    domains = digit_domains()
    found: dict[str, list[float]] = {}
    for i in (seed % 6, (seed + 3) % 6) if quick else range(6):
        away, epochs = DOMAINS[i], 2 if quick else 4
        sources = [domains[d][0] for d in DOMAINS if d != away]
        for name, score in _scores(arm, sources, *domains[away], epochs, seed).items():
            found.setdefault(f"accuracy: {name}", []).append(score)
    return {name: sum(scores) / len(scores) for name, scores in found.items()}


def _scores(
    arm: str, sources: list[Examples], unlabeled: Examples, test: Examples, epochs: int, seed: int
) -> dict[str, float]:
    if arm == "one BN":
        pooled = Examples.concat(sources)
        model = _network(seed)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        train(model, pooled, shuffled(len(pooled), 32, epochs, seed), optimizer)
        # In this order: AdaBN changes the statistics in place.
        return {"one BN": accuracy(model, test), "AdaBN": accuracy(recalibrate(model, unlabeled.x), test)}
    mixture = _branches(sources, epochs, seed, mixed=arm == "mixture")
    weighted = _share_right(probabilities(mixture, test.x, uniform=False), test)
    if arm == "mixture":
        return {"trained as mixture": weighted}
    return {
        "weighted": weighted,
        "uniform": _share_right(probabilities(mixture, test.x, uniform=True), test),
        "DSBN": accuracy(recalibrate(mixture.model, unlabeled.x), test),
    }


TRAINED = {
    "weighted": "branches",
    "uniform": "branches",
    "DSBN": "branches",
    "trained as mixture": "mixture",
    "AdaBN": "one BN",
}


def federated(arm: str, seed: int, quick: bool) -> dict[str, float]:
    """Accuracy on the test images of a client that never trained; the seed says which domain it is.

    The arm is a strategy.
    """
    away, rounds = DOMAINS[seed % 6], 3 if quick else 10
    scenario = f"digits:unseen={away}:test=500"
    plan = plan_for(scenario, rounds=rounds, eval_every=rounds, lr=0.05, momentum=0.9, schedule="cosine")
    run = Run(scenario, arm, seed=seed, model="small-cnn", plan=plan).resolved()
    outcome, ctx = execute(run, "reference"), build_context(run)
    (stranger,) = ctx.population.unseen
    test = ctx.population.users[stranger].test
    if arm == "global-pooled":
        return {"accuracy: one BN": accuracy(ctx.load(ctx.assemble(outcome.server.state, None)), test)}
    clients = [ctx.assemble(outcome.server.state, outcome.client_states[user]) for user in ctx.population.seen]
    mixture = BNE(register(copy.deepcopy(ctx.load(clients[0])), clients))
    return {
        f"accuracy: {name}": _share_right(probabilities(mixture, test.x, uniform=name == "uniform"), test)
        for name in ("weighted", "uniform")
    }


FEDERATED = {"weighted": "silobn", "uniform": "silobn", "one BN": "global-pooled"}

claim = partial(
    Claim,
    source="Segu, Tonioni, Tombari 2020, https://arxiv.org/abs/2011.12672",
    setting=f"{SIX}; one domain left out in turn; small-cnn",
    published="not verified",
    run=unseen,
    arms=("weighted", "uniform", "trained as mixture", "one BN", "DSBN", "AdaBN"),
    measure="accuracy",
    threshold=0.0,
    trained=lambda arm: TRAINED.get(arm, arm),
)
in_federation = partial(
    claim,
    setting="scenario digits at 28x28 pixels, one domain a client and one that never trains; small-cnn",
    run=federated,
    arms=("weighted", "uniform", "one BN"),
    trained=FEDERATED.__getitem__,
)

CLAIMS = (
    claim(
        name="bne-weights",
        sentence="Branches weighted by where a sample lies beat the same branches weighted alike.",
        effect=lambda v: v["weighted"] - v["uniform"],
        meaning="accuracy on unseen domains, weighted minus uniform",
    ),
    claim(
        name="bne-pooled",
        sentence="Branches trained as the mixture that they are in the end beat one BN for all domains.",
        effect=lambda v: v["trained as mixture"] - v["one BN"],
        meaning="accuracy on unseen domains, trained as mixture minus one BN",
    ),
    claim(
        name="bne-without-adaptation",
        sentence="BNE, which sees one image at a time, is as good as AdaBN, which sees the unlabeled domain.",
        source="the project's question",
        effect=lambda v: v["trained as mixture"] - v["AdaBN"],
        meaning="accuracy on unseen domains, trained as mixture minus AdaBN",
        threshold=-0.01,
    ),
    in_federation(
        name="bne-federated-weights",
        sentence="In federation, too, clients' branches weighted by where a sample lies beat them weighted alike.",
        source="carried over from Segu, Tonioni, Tombari 2020, https://arxiv.org/abs/2011.12672",
        effect=lambda v: v["weighted"] - v["uniform"],
        meaning="accuracy of a client that never trained, weighted minus uniform",
    ),
    in_federation(
        name="bne-federated-pooled",
        sentence="A client that never trained is served better by the clients' embeddings than by one global BN.",
        source="carried over from Segu, Tonioni, Tombari 2020, https://arxiv.org/abs/2011.12672",
        effect=lambda v: v["weighted"] - v["one BN"],
        meaning="accuracy of a client that never trained, embedded minus global BN with pooled statistics",
    ),
)

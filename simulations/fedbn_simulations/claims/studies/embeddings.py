"""Batch normalization embeddings for unseen domains (Segu, Tonioni, Tombari).

Digits of six domains; each is left out of training in turn. The method is a reconstruction (`fedbn.norms.bne`). It is
compared with the uniform ensemble of its branches; DSBN, with a branch for the new domain whose statistics come from
unlabeled images; and a single BN for all domains, without adaptation and with statistics of the new domain (AdaBN).
Methods share a training if possible. In federated runs each domain is a client with local statistics (SiloBN), and
the embedding of an unseen client is computed from theirs.
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
from fedbn_simulations.claims.claim import Claim
from fedbn_simulations.claims.studies.common import (
    DOMAINS,
    SIX_DOMAINS,
    accuracy,
    digit_domains,
    seeded,
    shuffled,
    train,
)
from fedbn_simulations.engines.execute import execute

NUMERICS = 2


def _network(seed: int) -> SmallCNN:
    with seeded(seed, "weights"):
        return SmallCNN((3, 14, 14), 10)


def _branches(sources: list[Examples], epochs: int, seed: int, *, mixed: bool) -> BNE:
    """Train shared weights and statistics per domain, on batches of one domain each, in turn.

    Args:
        sources: training data of each domain.
        epochs: number of epochs over all domains.
        seed: random seed of weights and batches.
        mixed: whether to minimize the loss of the mixture in the last quarter of the epochs.
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
    """Mean of the branches' probabilities ``[n, classes]`` for ``x``, weighted by similarity or uniformly."""
    mixture.eval()
    with torch.no_grad():
        if not uniform:
            return mixture(x)[0].exp()
        outputs = []
        for domain in range(mixture.domains):
            set_domain(mixture.model, domain)
            outputs.append(mixture.model(x).softmax(1))
        return torch.stack(outputs).mean(0)


def _accuracy(p: Tensor, test: Examples) -> float:
    return float((p.argmax(1) == test.y).double().mean())


def unseen(arm: str, seed: int, quick: bool) -> dict[str, float]:
    """Mean accuracy on left-out domains; a quick run uses two of them, depending on the seed.

    The arm is the training: a single BN for all domains, separate branches, or branches as a mixture.
    """
    domains = digit_domains()
    accuracies: dict[str, list[float]] = {}
    for i in (seed % 6, (seed + 3) % 6) if quick else range(6):
        left_out, epochs = DOMAINS[i], 2 if quick else 4
        sources = [domains[d][0] for d in DOMAINS if d != left_out]
        for name, score in _scores(arm, sources, *domains[left_out], epochs, seed).items():
            accuracies.setdefault(f"accuracy: {name}", []).append(score)
    return {name: sum(scores) / len(scores) for name, scores in accuracies.items()}


def _scores(
    arm: str, sources: list[Examples], unlabeled: Examples, test: Examples, epochs: int, seed: int
) -> dict[str, float]:
    if arm == "one BN":
        pooled = Examples.concat(sources)
        model = _network(seed)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        train(model, pooled, shuffled(len(pooled), 32, epochs, seed), optimizer)
        # AdaBN changes the statistics in place, so it comes last.
        return {"one BN": accuracy(model, test), "AdaBN": accuracy(recalibrate(model, unlabeled.x), test)}
    mixture = _branches(sources, epochs, seed, mixed=arm == "mixture")
    weighted = _accuracy(probabilities(mixture, test.x, uniform=False), test)
    if arm == "mixture":
        return {"trained as mixture": weighted}
    return {
        "weighted": weighted,
        "uniform": _accuracy(probabilities(mixture, test.x, uniform=True), test),
        "DSBN": accuracy(recalibrate(mixture.model, unlabeled.x), test),
    }


TRAINED = {
    **dict.fromkeys(("weighted", "uniform", "DSBN"), "branches"),
    "trained as mixture": "mixture",
    "AdaBN": "one BN",
}


def federated(arm: str, seed: int, quick: bool) -> dict[str, float]:
    """Accuracy on the test images of an unseen client, whose domain depends on the seed; the arm is a strategy."""
    unseen_domain, rounds = DOMAINS[seed % 6], 3 if quick else 10
    scenario = f"digits:unseen={unseen_domain}:test=500"
    plan = plan_for(scenario, rounds=rounds, eval_every=rounds, lr=0.05, momentum=0.9, schedule="cosine")
    run = Run(scenario, arm, seed=seed, model="small-cnn", plan=plan).resolved()
    outcome, ctx = execute(run, "reference"), build_context(run)
    (user_id,) = ctx.population.unseen
    test = ctx.population.users[user_id].test
    if arm == "global-pooled":
        return {"accuracy: one BN": accuracy(ctx.load(ctx.assemble(outcome.server.state, None)), test)}
    clients = [ctx.assemble(outcome.server.state, outcome.client_states[user]) for user in ctx.population.seen]
    mixture = BNE(register(copy.deepcopy(ctx.load(clients[0])), clients))
    return {
        f"accuracy: {name}": _accuracy(probabilities(mixture, test.x, uniform=name == "uniform"), test)
        for name in ("weighted", "uniform")
    }


claim = partial(
    Claim,
    source="Segu, Tonioni, Tombari 2020, https://arxiv.org/abs/2011.12672",
    setting=f"{SIX_DOMAINS}; each domain left out in turn; small-cnn",
    published="not verified",
    run=unseen,
    arms=("weighted", "uniform", "trained as mixture", "one BN", "DSBN", "AdaBN"),
    measure="accuracy",
    threshold=0.0,
    trained=lambda arm: TRAINED.get(arm, arm),
)
in_federation = partial(
    claim,
    source="transferred from Segu, Tonioni, Tombari 2020, https://arxiv.org/abs/2011.12672",
    setting="scenario digits at 28x28 pixels, one domain per client and one unseen domain; small-cnn",
    run=federated,
    arms=("weighted", "uniform", "one BN"),
    trained={"weighted": "silobn", "uniform": "silobn", "one BN": "global-pooled"}.__getitem__,
)

CLAIMS = (
    claim(
        name="bne-weights",
        sentence="Weighting the branches by their similarity to a sample beats uniform weights.",
        effect=lambda v: v["weighted"] - v["uniform"],
        meaning="accuracy on unseen domains, weighted minus uniform",
    ),
    claim(
        name="bne-pooled",
        sentence="Branches trained as a mixture beat a single BN for all domains.",
        effect=lambda v: v["trained as mixture"] - v["one BN"],
        meaning="accuracy on unseen domains, trained as mixture minus a single BN",
    ),
    claim(
        name="bne-without-adaptation",
        sentence="BNE, which uses one image at a time, is as good as AdaBN, which uses the unlabeled domain.",
        source="our question",
        effect=lambda v: v["trained as mixture"] - v["AdaBN"],
        meaning="accuracy on unseen domains, trained as mixture minus AdaBN",
        threshold=-0.01,
    ),
    in_federation(
        name="bne-federated-weights",
        sentence="In federated learning, weighting branches by similarity to the sample also beats uniform weights.",
        effect=lambda v: v["weighted"] - v["uniform"],
        meaning="accuracy of an unseen client, weighted minus uniform",
    ),
    in_federation(
        name="bne-federated-pooled",
        sentence="For an unseen client, the clients' embeddings are more accurate than a global BN.",
        effect=lambda v: v["weighted"] - v["one BN"],
        meaning="accuracy of an unseen client, embeddings minus global BN with pooled statistics",
    ),
)

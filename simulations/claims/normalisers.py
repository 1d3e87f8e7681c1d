"""Normalisers in federated learning: which wins depends on the skew.

Whole federated runs of the reference loop, on clients that differ in their labels or in their cameras.
"""

from __future__ import annotations

from functools import partial

from fedbn.run import Run, plan_for
from simulations.claims import Claim
from simulations.claims.bench import mean_accuracy
from simulations.engines import execute

LABEL = "pathological:classes=2"


def federated(arm: str, seed: int, quick: bool, *, scenario: str, partition: str, rounds: int) -> dict[str, float]:
    """Accuracies of a federated run with the strategy that the arm names."""
    plan = plan_for(scenario, rounds=rounds, eval_every=rounds, schedule="cosine")
    outcome = execute(Run(scenario, arm, seed=seed, partition=partition, plan=plan).resolved(), "reference")
    return {"own test": mean_accuracy(outcome, "own"), "global test": mean_accuracy(outcome, "global")}


def label_skew(arm: str, seed: int, quick: bool) -> dict[str, float]:
    """Digits with two classes a client."""
    return federated(arm, seed, quick, scenario="digits8", partition=LABEL, rounds=5 if quick else 25)


def feature_skew(arm: str, seed: int, quick: bool) -> dict[str, float]:
    """Digits with a camera a client."""
    return federated(arm, seed, quick, scenario="digits8", partition="natural", rounds=5 if quick else 25)


def real_users(arm: str, seed: int, quick: bool) -> dict[str, float]:
    """People with a phone at the waist, later recordings for testing."""
    return federated(arm, seed, quick, scenario="hapt", partition="natural", rounds=2 if quick else 12)


LABELS = "digits8, 10 clients with two classes each; small-cnn"
CAMERAS = "digits8, 10 clients with made-up cameras; small-cnn"
PEOPLE = "HAPT, 24 of 30 people train; har-cnn"
claim = partial(Claim, published="not verified")

CLAIMS = (
    claim(
        name="groupnorm-label-skew",
        sentence="Where clients hold few classes each, group normalisation beats global BN.",
        source="Hsieh et al. 2020, https://arxiv.org/abs/1910.00189",
        setting=LABELS,
        run=label_skew,
        arms=("groupnorm", "global-naive"),
        measure="global test",
        effect=lambda v: v["groupnorm"] - v["global-naive"],
        meaning="accuracy on the pooled test set, GN minus global BN",
        threshold=0.0,
    ),
    claim(
        name="fedbn-feature-skew",
        sentence="Where clients differ in their inputs, local BN beats global BN on the clients' own data.",
        source="Li et al. 2021, https://arxiv.org/abs/2102.07623",
        setting=CAMERAS,
        run=feature_skew,
        arms=("fedbn", "global-naive"),
        measure="own test",
        effect=lambda v: v["fedbn"] - v["global-naive"],
        meaning="accuracy on the clients' own tests, FedBN minus global BN",
        threshold=0.0,
    ),
    claim(
        name="fedbn-real-users",
        sentence="Local BN beats global BN on people's own later recordings.",
        source="Li et al. 2021, https://arxiv.org/abs/2102.07623",
        setting=PEOPLE,
        run=real_users,
        arms=("fedbn", "global-naive"),
        measure="own test",
        effect=lambda v: v["fedbn"] - v["global-naive"],
        meaning="accuracy on the users' own tests, FedBN minus global BN",
        threshold=0.0,
    ),
    claim(
        name="silobn-global-label-skew",
        sentence="With few classes a client, keeping statistics local costs a model that is to serve everybody.",
        source="follows from Andreux et al. 2020, https://arxiv.org/abs/2008.07424",
        setting=LABELS,
        run=label_skew,
        arms=("global-naive", "silobn"),
        measure="global test",
        effect=lambda v: v["global-naive"] - v["silobn"],
        meaning="accuracy on the pooled test set, global BN minus SiloBN",
        threshold=0.0,
    ),
    claim(
        name="recalibrated-label-skew",
        sentence="Measuring statistics again under the aggregated weights mends global BN.",
        source="after Diao, Ding, Tarokh 2021, https://arxiv.org/abs/2010.01264",
        setting=LABELS,
        run=label_skew,
        arms=("global-recalibrated", "global-naive"),
        measure="global test",
        effect=lambda v: v["global-recalibrated"] - v["global-naive"],
        meaning="accuracy on the pooled test set, recalibrated minus naive",
        threshold=0.0,
    ),
)

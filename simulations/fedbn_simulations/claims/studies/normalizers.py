"""Normalizers in federated learning: the best one depends on the skew.

Complete federated runs of the reference loop. First strategies for BN on real and synthetic users; then a grid of
normalizers with two architectures, batches of 4 and 32, and data distributed at random, by few classes per client or by
one camera per client.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from fedbn.federation.run import Run, plan_for
from fedbn_simulations.claims.claim import Claim
from fedbn_simulations.claims.studies.common import mean_accuracy
from fedbn_simulations.engines.execute import execute

NUMERICS = 2

SKEWS = {"iid": "iid:clients=8", "labels": "pathological:classes=2", "cameras": "natural"}
NORMS = {
    "BN": "global-naive",
    "LN": "layernorm",
    "IN": "instancenorm",
    "GN": "groupnorm:groups=4",
    "WN": "weight-norm",
    "HBN": "hbn",
}
SETTINGS = tuple(f"{model} {skew} {size}" for model in ("small-cnn", "mlp") for skew in SKEWS for size in (4, 32))


def federated(arm: str, seed: int, quick: bool, *, scenario: str, partition: str, rounds: int) -> dict[str, float]:
    """Accuracies of a federated run; the arm is the strategy."""
    plan = plan_for(scenario, rounds=rounds, eval_every=rounds, schedule="cosine")
    outcome = execute(Run(scenario, arm, seed=seed, partition=partition, plan=plan).resolved(), "reference")
    return {"own test": mean_accuracy(outcome, "own"), "global test": mean_accuracy(outcome, "global")}


def label_skew(arm: str, seed: int, quick: bool) -> dict[str, float]:
    """Accuracies on digits with two classes per client."""
    return federated(arm, seed, quick, scenario="digits8", partition=SKEWS["labels"], rounds=5 if quick else 25)


def feature_skew(arm: str, seed: int, quick: bool) -> dict[str, float]:
    """Accuracies on digits with one camera per client."""
    return federated(arm, seed, quick, scenario="digits8", partition="natural", rounds=5 if quick else 25)


def real_users(arm: str, seed: int, quick: bool) -> dict[str, float]:
    """Accuracies on people with a phone at the waist, tested on later recordings."""
    return federated(arm, seed, quick, scenario="hapt", partition="natural", rounds=2 if quick else 6)


def grid(arm: str, seed: int, quick: bool) -> dict[str, float]:
    """Accuracy on the pooled test set; the arm is a normalizer, a model, a skew and the batch size.

    The learning rate is proportional to the square root of the batch size. Large batches have more rounds, because a
    round has fewer steps.
    """
    norm, _, setting = arm.partition(" @ ")
    model, skew, size = setting.split()
    rounds = (2 if quick else 4) if size == "4" else (4 if quick else 16)
    plan = plan_for(
        "digits8", rounds=rounds, eval_every=rounds, schedule="cosine", batch_size=int(size), lr=0.01 * int(size) ** 0.5
    )
    run = Run("digits8", NORMS[norm], seed=seed, model=model, partition=SKEWS[skew], plan=plan)
    return {"accuracy": mean_accuracy(execute(run.resolved(), "reference"), "global")}


def mean_gain(values: Mapping[str, float], norm: str, baseline: str, *keywords: str) -> float:
    """Accuracy of a normalizer minus that of a baseline, mean over the settings with all ``keywords``."""
    selected = [s for s in SETTINGS if set(keywords) <= set(s.split()) and f"{norm} @ {s}" in values]
    return sum(values[f"{norm} @ {s}"] - values[f"{baseline} @ {s}"] for s in selected) / len(selected)


claim = partial(Claim, published="not verified", threshold=0.0)
with_few_labels = partial(
    claim, setting="digits8, 10 clients with two classes each; small-cnn", run=label_skew, measure="global test"
)
of_local_bn = partial(
    claim,
    source="Li et al. 2021, https://arxiv.org/abs/2102.07623",
    arms=("fedbn", "global-naive"),
    measure="own test",
    effect=lambda v: v["fedbn"] - v["global-naive"],
)
in_one_grid = partial(
    claim,
    setting="digits8, 8 clients; small-cnn and mlp, batches of 4 and 32, three kinds of skew",
    run=grid,
    # Instance normalization needs positions, which the MLP does not have.
    arms=tuple(f"{norm} @ {s}" for norm in NORMS for s in SETTINGS if norm != "IN" or "cnn" in s),
    measure="accuracy",
    drawing="grid",
)

CLAIMS = (
    with_few_labels(
        name="groupnorm-label-skew",
        sentence="With few classes per client, group normalization beats global BN.",
        source="Hsieh et al. 2020, https://arxiv.org/abs/1910.00189",
        arms=("groupnorm", "global-naive"),
        effect=lambda v: v["groupnorm"] - v["global-naive"],
        meaning="accuracy on the pooled test set, GN minus global BN",
    ),
    of_local_bn(
        name="fedbn-feature-skew",
        sentence="With different inputs per client, local BN beats global BN on the clients' own data.",
        setting="digits8, 10 clients with synthetic cameras; small-cnn",
        run=feature_skew,
        meaning="accuracy on the clients' own tests, FedBN minus global BN",
    ),
    of_local_bn(
        name="fedbn-real-users",
        sentence="Local BN beats global BN on people's own later recordings.",
        setting="HAPT, 24 of 30 people train; har-cnn",
        run=real_users,
        meaning="accuracy on the users' own tests, FedBN minus global BN",
    ),
    with_few_labels(
        name="silobn-global-label-skew",
        sentence="With few classes per client, local statistics reduce the accuracy on pooled data.",
        source="follows from Andreux et al. 2020, https://arxiv.org/abs/2008.07424",
        arms=("global-naive", "silobn"),
        effect=lambda v: v["global-naive"] - v["silobn"],
        meaning="accuracy on the pooled test set, global BN minus SiloBN",
    ),
    with_few_labels(
        name="recalibrated-label-skew",
        sentence="Recalibrating the statistics with the aggregated weights improves global BN.",
        source="after Diao, Ding, Tarokh 2021, https://arxiv.org/abs/2010.01264",
        arms=("global-recalibrated", "global-naive"),
        effect=lambda v: v["global-recalibrated"] - v["global-naive"],
        meaning="accuracy on the pooled test set, recalibrated minus naive",
    ),
    in_one_grid(
        name="grid-labels",
        sentence="With few classes per client, BN loses more than group normalization, over models and batch sizes.",
        source="after Hsieh et al. 2020, https://arxiv.org/abs/1910.00189",
        effect=lambda v: mean_gain(v, "GN", "BN", "labels") - mean_gain(v, "GN", "BN", "iid"),
        meaning="mean accuracy of GN minus BN, few classes per client minus randomly distributed data",
    ),
    in_one_grid(
        name="grid-batch",
        sentence="With small batches, BN loses more than layer normalization, over models and skews.",
        source="after Ba, Kiros, Hinton 2016, https://arxiv.org/abs/1607.06450",
        effect=lambda v: mean_gain(v, "LN", "BN", "4") - mean_gain(v, "LN", "BN", "32"),
        meaning="mean accuracy of LN minus BN, batches of 4 minus batches of 32",
    ),
    in_one_grid(
        name="grid-adaptive",
        sentence="A learned mixture of global and batch statistics (HBN) beats global BN under label skew.",
        source="Chen et al. 2025 (HBN, ICML)",
        effect=lambda v: mean_gain(v, "HBN", "BN", "labels"),
        meaning="mean accuracy of HBN minus BN with few classes per client",
    ),
    in_one_grid(
        name="grid-weightnorm",
        sentence="With few classes per client, weight normalization, which has no statistics, loses less than BN.",
        source="after Salimans, Kingma 2016, https://arxiv.org/abs/1602.07868",
        effect=lambda v: mean_gain(v, "WN", "BN", "labels") - mean_gain(v, "WN", "BN", "iid"),
        meaning="mean accuracy of WN minus BN, few classes per client minus randomly distributed data",
    ),
)

"""FedTAN: what label skew costs BN, and what exact statistics save (Wang, Shi, Chang).

Federated SGD, one full-batch step a round, five clients with two label-sorted shards each or with rows dealt at random.
"""

from __future__ import annotations

from functools import partial

from fedbn.run import Run, plan_for
from simulations.claims import Claim
from simulations.claims.bench import mean_accuracy
from simulations.engines import execute

SCENARIO = "tabular:table=digits:dealt=random:users=7"
PARTITIONS = {"IID": "iid:clients=5", "sorted": "shard:clients=5"}


def one_step(arm: str, seed: int, quick: bool) -> dict[str, float]:
    """Accuracy on the pooled test set; the arm is a strategy and a partition."""
    strategy, _, partition = arm.partition(" ")
    rounds = 40 if quick else 200
    plan = plan_for(SCENARIO, rounds=rounds, eval_every=rounds, batch_size=2000, local_epochs=1, lr=0.2, momentum=0.0)
    run = Run(SCENARIO, strategy, seed=seed, partition=PARTITIONS[partition], plan=plan).resolved()
    outcome = execute(run, "reference")
    return {"accuracy": mean_accuracy(outcome, "global")}


claim = partial(
    Claim,
    source="Wang, Shi, Chang 2023, https://arxiv.org/abs/2301.02982",
    published="not verified (no table was read)",
    setting="scikit-learn's digits as a table, 5 clients; MLP with one hidden layer of 32, one full-batch step a round",
    run=one_step,
    measure="accuracy",
)

CLAIMS = (
    claim(
        name="fedtan-bn-suffers",
        sentence="Clients with label-sorted shards cost federated BN more than three points of accuracy.",
        arms=("global-naive IID", "global-naive sorted"),
        effect=lambda v: v["global-naive IID"] - v["global-naive sorted"],
        meaning="accuracy of global BN, IID minus label-sorted",
        threshold=0.03,
    ),
    claim(
        name="fedtan-is-immune",
        sentence="They cost FedTAN less than one and a half points.",
        arms=("fedtan IID", "fedtan sorted"),
        effect=lambda v: v["fedtan sorted"] - v["fedtan IID"],
        meaning="accuracy of FedTAN, label-sorted minus IID",
        threshold=-0.015,
    ),
    claim(
        name="fedtan-beats-groupnorm",
        sentence="With label-sorted shards FedTAN is at least as accurate as group normalisation.",
        arms=("fedtan sorted", "groupnorm sorted"),
        effect=lambda v: v["fedtan sorted"] - v["groupnorm sorted"],
        meaning="accuracy with label-sorted shards, FedTAN minus GN",
        threshold=0.0,
    ),
)

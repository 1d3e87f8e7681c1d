"""FedTAN: BN with exact statistics under label skew (Wang, Shi, Chang).

Federated SGD with one full-batch step per round (E = 1). Clients have two label-sorted shards each, or randomly
distributed data. Compares the gradient of single layers with that of the pooled data, the accuracy after many rounds,
and the cost of the statistics in messages and bytes.
"""

from __future__ import annotations

from functools import partial

from torch import Tensor

from fedbn.federation.client import client_sync_first_batch
from fedbn.federation.context import CENTRAL_TRAINER
from fedbn.federation.loop import federate
from fedbn.federation.run import Run, plan_for
from fedbn.federation.setup import build_context
from fedbn.nn.roles import statistics_layers
from fedbn.statistics.consensus import run_consensus
from fedbn.strategies.base import Progress
from fedbn_simulations.claims.claim import Claim
from fedbn_simulations.claims.studies.common import mean_accuracy
from fedbn_simulations.engines.execute import execute

NUMERICS = 2

SCENARIO = "tabular:table=digits:dealt=random:users=7"
IMAGES = "digits8:users=7"
PARTITIONS = {"IID": "iid:clients=5", "sorted": "shard:clients=5"}
LAYERS = {"1": "features.0.weight", "2": "features.4.weight", "3": "classifier.weight"}
RATE = 0.2


def _run(
    scenario: str, strategy: str, partition: str, seed: int, rounds: int, model: str = "", size: int = 2000
) -> Run:
    plan = plan_for(scenario, rounds=rounds, eval_every=rounds, batch_size=size, local_epochs=1, lr=RATE, momentum=0.0)
    return Run(scenario, strategy, seed=seed, model=model, partition=PARTITIONS[partition], plan=plan).resolved()


def one_step(arm: str, seed: int, quick: bool) -> dict[str, float]:
    """Accuracy on the pooled test set; the arm is a strategy and a partition."""
    strategy, _, partition = arm.partition(" ")
    outcome = execute(_run(SCENARIO, strategy, partition, seed, 40 if quick else 100), "reference")
    return {"accuracy": mean_accuracy(outcome, "global")}


def _gradient(strategy: str, partition: str, seed: int) -> dict[str, Tensor]:
    """Change of the parameters in the first round divided by the learning rate, by name."""
    run = _run(IMAGES, strategy, partition, seed, rounds=1)
    before, outcome = build_context(run).initial_server_state(), federate(run)
    # A centralized run stores its model as the state of the client CENTRAL_TRAINER.
    after = outcome.server.state | outcome.client_states.get(CENTRAL_TRAINER, {})
    return {name: (before[name] - after[name]) / RATE for name in LAYERS.values()}


def gradients(arm: str, seed: int, quick: bool) -> dict[str, float]:
    """Distance of the clients' mean gradient from that of the pooled data, relative to its norm, by layer."""
    strategy, partition = arm.split()
    gradient, exact = (_gradient(s, partition, seed) for s in (strategy, "centralized"))
    return {
        f"gradient deviation: {arm} {layer}": float((gradient[name] - exact[name]).norm() / exact[name].norm())
        for layer, name in LAYERS.items()
    }


def cost(arm: str, seed: int, quick: bool) -> dict[str, float]:
    """Exchanges per round beyond 3 L + 1 for L layers, and the size of a client's statistics relative to its model.

    The arm is a model.
    """
    # The size of the messages does not depend on the batch size.
    run = _run(IMAGES, "fedtan", "sorted", seed, 1, model=arm, size=16)
    ctx = build_context(run)
    progress, state = Progress(1, 1), ctx.initial_server_state()
    aggregates = list(
        run_consensus(
            lambda previous: [client_sync_first_batch(ctx, u, state, None, progress, previous) for u in ctx.trainers]
        )
    )
    layers = len(statistics_layers(ctx.scratch))
    sent = sum(moments.mean.numel() for aggregate in aggregates for moments in aggregate.values())
    return {
        "exchanges": len(aggregates) + 1.0,
        "exchanges beyond 3L+1": len(aggregates) + 1.0 - (3 * layers + 1),
        "share of the model": sent / sum(v.numel() for v in state.values()),
    }


TABLE = "scikit-learn's digits as a table, 5 clients; MLP with one hidden layer of 32, one full-batch step per round"
claim = partial(
    Claim,
    source="Wang, Shi, Chang 2023, https://arxiv.org/abs/2301.02982",
    published="not verified (no table was read)",
)
accurate = partial(
    claim,
    setting=TABLE,
    run=one_step,
    arms=tuple(f"{s} {p}" for s in ("global-naive", "groupnorm", "fedtan") for p in PARTITIONS),
    measure="accuracy",
)
deviating = partial(
    claim,
    setting="digits8 with label-sorted shards, 5 clients; small-cnn, the first full-batch step",
    run=gradients,
    arms=tuple(
        f"{training} {layer}"
        for training in ("global-naive sorted", "global-naive IID", "fedtan sorted")
        for layer in LAYERS
    ),
    measure="gradient deviation",
    trained=lambda arm: arm.rpartition(" ")[0],
    drawing="curves",
    axis="layer (1, 2: convolutions; 3: classifier)",
)
costing = partial(
    claim, setting="digits8, 5 clients; one round of FedTAN", run=cost, arms=("mlp", "small-cnn", "resnet20")
)

CLAIMS = (
    deviating(
        name="fedtan-bn-deviates",
        sentence="With label-sorted clients, the gradient of federated BN deviates from that of the pooled data.",
        effect=lambda v: v["global-naive sorted 1"],
        meaning="relative deviation of the gradient of the first convolution, global BN",
        threshold=0.1,
    ),
    deviating(
        name="fedtan-is-exact",
        sentence="The gradient of FedTAN equals that of the pooled data.",
        effect=lambda v: -max(v[f"fedtan sorted {layer}"] for layer in LAYERS),
        meaning="negative of the largest relative deviation over layers",
        threshold=-1e-4,
    ),
    accurate(
        name="fedtan-bn-suffers",
        sentence="With label-sorted shards, federated BN loses more than three points of accuracy.",
        effect=lambda v: v["global-naive IID"] - v["global-naive sorted"],
        meaning="accuracy of global BN, IID minus label-sorted",
        threshold=0.03,
    ),
    accurate(
        name="fedtan-is-immune",
        sentence="With label-sorted shards, FedTAN loses less than one and a half points of accuracy.",
        effect=lambda v: v["fedtan sorted"] - v["fedtan IID"],
        meaning="accuracy of FedTAN, label-sorted minus IID",
        threshold=-0.015,
    ),
    accurate(
        name="fedtan-beats-groupnorm",
        sentence="With label-sorted shards FedTAN is at least as accurate as group normalization.",
        effect=lambda v: v["fedtan sorted"] - v["groupnorm sorted"],
        meaning="accuracy with label-sorted shards, FedTAN minus GN",
        threshold=0.0,
    ),
    costing(
        name="fedtan-messages",
        sentence="A round takes 3 L + 1 exchanges for L normalization layers.",
        published="not verified; derived from the authors' code",
        measure="exchanges beyond 3L+1",
        effect=lambda v: -max(abs(x) for x in v.values()),
        meaning="negative of the largest difference from 3 L + 1 over the models",
        threshold=-0.5,
        note="each exchange waits for the slowest client, so the cost is mainly waiting time",
    ),
    costing(
        name="fedtan-bytes",
        sentence="The additional messages have less than five percent of the size of a deep model.",
        source="derived from the authors' code",
        measure="share of the model",
        effect=lambda v: -v["resnet20"],
        meaning="negative ratio of statistics and their gradients to the entries of ResNet-20",
        threshold=-0.05,
    ),
)

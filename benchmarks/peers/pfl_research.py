"""pfl-research on the same workloads: ``python -m benchmarks.peers.pfl_research RUN THREADS``.

Its requirements conflict with those of this project, so it needs a separate environment (``make bench-peers``). It
averages parameters and keeps updating the running statistics of its single model, so only times are comparable.
Granqvist et al., *pfl-research: simulation framework for accelerating research in Private Federated Learning*, 2024,
https://arxiv.org/abs/2404.06430
"""

from __future__ import annotations

import sys
from itertools import cycle

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.rounds import Meter, context_from_arguments
from fedbn.errors import UserError
from fedbn.federation.context import RunContext


class Learner(nn.Module):
    """A run's model with the interface that pfl requires."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        """Mean cross-entropy of a batch."""
        self.train()
        return F.cross_entropy(self.model(x), y)

    def metrics(self, x: Tensor, y: Tensor) -> dict[str, float]:
        """Empty: nothing is evaluated."""
        return {}


def serve(ctx: RunContext) -> None:
    """Run a round for each line on standard input.

    Raises:
        UserError: pfl is not installed.
    """
    try:
        from pfl.aggregate.simulate import SimulatedBackend
        from pfl.algorithm.base import NNAlgorithmParams
        from pfl.algorithm.federated_averaging import FederatedAveraging
        from pfl.callback.base import TrainingProcessCallback
        from pfl.data.dataset import Dataset
        from pfl.data.federated_dataset import FederatedDataset
        from pfl.hyperparam.base import NNEvalHyperParams, NNTrainHyperParams
        from pfl.metrics import Metrics
        from pfl.model.pytorch import PyTorchModel
    except ImportError as error:
        raise UserError(f"pfl needs its own environment: run make bench-peers ({error})") from None

    class TimeRounds(TrainingProcessCallback):  # type: ignore[misc]
        def after_central_iteration(
            self, aggregate_metrics: object, model: object, *, central_iteration: int
        ) -> tuple[bool, Metrics]:
            meter.reply()
            meter.wait()
            return False, Metrics()

    def data(user: int) -> Dataset:
        return Dataset((ctx.training_data(user).x, ctx.training_data(user).y), user_id=str(user))

    users, plan = cycle(ctx.trainers), ctx.run.plan
    learner = Learner(ctx.scratch)
    model = PyTorchModel(learner, torch.optim.SGD, torch.optim.SGD(learner.parameters(), lr=1.0))
    dataset = FederatedDataset(data, lambda: next(users))
    meter = Meter()
    meter.wait()
    FederatedAveraging().run(
        NNAlgorithmParams(
            central_num_iterations=sys.maxsize,
            evaluation_frequency=sys.maxsize,
            train_cohort_size=len(ctx.trainers),
            val_cohort_size=0,
        ),
        SimulatedBackend(dataset, dataset),
        model,
        NNTrainHyperParams(
            local_num_epochs=plan.local_epochs, local_learning_rate=plan.lr, local_batch_size=plan.batch_size
        ),
        NNEvalHyperParams(local_batch_size=None),
        callbacks=[TimeRounds()],
        send_metrics_to_platform=False,
    )


if __name__ == "__main__":
    ctx, threads = context_from_arguments()
    torch.set_num_threads(threads)
    serve(ctx)

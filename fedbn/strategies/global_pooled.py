"""Global BN with the variance of the union: mean of the variances plus variance of the means."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fedbn.nn.roles import State
from fedbn.statistics.moments import naive_mean, pooled_variance
from fedbn.strategies.base import NormStrategy, Progress, Updates, entry_values


@dataclass(frozen=True)
class GlobalPooled(NormStrategy):
    r"""Share all entries; :math:`\sigma^2 \leftarrow \sum_k w_k \sigma_k^2 + \sum_k w_k (\mu_k-\mu)^2`.

    Law of total variance. It is exact for moments measured under the same weights. Running averages of clients with
    different local weights are not, which `global-recalibrated` corrects. Chan, Golub, LeVeque, 1979, Updating formulae
    and a pairwise algorithm for computing sample variances,
    http://i.stanford.edu/pub/cstr/reports/cs/tr/79/773/CS-TR-79-773.pdf

    >>> import torch; from fedbn.strategies.base import Update
    >>> def client(i, mean): return Update(
    ...     i, {"bn.running_mean": torch.tensor([mean]), "bn.running_var": torch.ones(1)}, 1, 0.0)
    >>> names = ["bn.running_mean", "bn.running_var"]
    >>> GlobalPooled().aggregate_statistics([client(0, -3.0), client(1, 3.0)], [1, 1], names, {}, Progress(1, 1))
    {'bn.running_mean': tensor([0.]), 'bn.running_var': tensor([10.])}
    """

    name = "global-pooled"
    title = "FedAvg (pooled BN)"
    about = "one BN for all; variances by the law of total variance"
    source = "Chan, Golub, LeVeque 1979"

    def aggregate_statistics(
        self, updates: Updates, weights: Sequence[float], keys: Sequence[str], old: State, progress: Progress
    ) -> State:
        out: State = {}
        for key in keys:
            values = entry_values(updates, key)
            layer, _, entry = key.rpartition(".")
            mean_key = f"{layer}.running_mean" if layer else "running_mean"
            if entry == "running_var" and mean_key in keys:
                out[key] = pooled_variance(entry_values(updates, mean_key), values, weights)
            else:
                out[key] = naive_mean(values, weights)
        return out

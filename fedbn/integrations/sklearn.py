"""Personalized classifier with the interface of scikit-learn, plus `adapt` for user-specific statistics."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.preprocessing import LabelEncoder
from sklearn.utils import check_random_state
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import nn

from fedbn.config import Plan
from fedbn.data.population import Examples, Population, User
from fedbn.errors import UserError
from fedbn.federation.context import RunContext
from fedbn.federation.loop import federate
from fedbn.federation.run import Run
from fedbn.federation.setup import build_context_for
from fedbn.nn.conversion import require_statistics
from fedbn.nn.roles import Role
from fedbn.online import LayerPrior, Personalized, personalize, population_prior
from fedbn.online.prior import MAX_N0, layer_priors
from fedbn.online.rules.base import rule as parse_rule
from fedbn.online.validation import require_batch_norm_formula, require_independent_rows
from fedbn.strategies.ownership import LOCAL

Users = str | int | Sequence[str | int] | NDArray[Any]


class PersonalizedClassifier(ClassifierMixin, BaseEstimator):
    """Train one network on all users, then adapt each user's statistics to unlabeled rows of that user.

    `fit` trains with federated learning over the groups, `predict` changes no state, and `adapt` updates the statistics
    of users. Rows are ``[n, features]`` or of any shape that the model accepts, such as windows ``[n, channels,
    time]``.

    Args:
        model: built-in network or ``package.module:factory`` with BN layers.
        rule: adaptation rule (``fedbn list rules``). The default weights a user's own statistics by the differences
            between the groups and by the diversity of the predicted classes: it gains most under a shift of the
            features, and a stream of one class hardly moves it (docs/adaptation.md). With a single group, nothing is
            known of such differences, and the network stays as it was trained.
        strategy: normalization strategy during training (``fedbn list strategies``).
        rounds: number of federated rounds; with one group, number of epochs.
        batch_size: training batch size.
        lr: learning rate.
        random_state: seed of initial weights and shuffling.

    Attributes:
        classes_: class labels seen during `fit`.
        n_features_in_: size of the second axis of the training data.
        network_: `fedbn.online.Personalized` network with the statistics of all users.

    >>> rng = np.random.default_rng(0)
    >>> X, y = rng.normal(size=(80, 4)), np.repeat(["rest", "walk"], 40)
    >>> X[40:] += 3
    >>> shifted = X + np.repeat([[0.0], [1.0]], 40, 0).take(np.arange(80) % 2 * 40, 0)
    >>> clf = PersonalizedClassifier(rounds=5, random_state=0).fit(shifted, y, groups=np.arange(80) % 2)
    >>> clf.adapt(X, user="new").predict(X[[0, 79]], user="new").tolist()
    ['rest', 'walk']
    """

    def __init__(
        self,
        model: str = "mlp",
        rule: str = "population:diversity=1",
        strategy: str = "global-pooled",
        rounds: int = 20,
        batch_size: int = 32,
        lr: float = 0.05,
        random_state: int | np.random.RandomState | None = None,
    ) -> None:
        self.model = model
        self.rule = rule
        self.strategy = strategy
        self.rounds = rounds
        self.batch_size = batch_size
        self.lr = lr
        self.random_state = random_state

    def fit(self, X: ArrayLike, y: ArrayLike, groups: ArrayLike | None = None) -> PersonalizedClassifier:
        """Train with federated learning over the groups; afterwards no user has adapted statistics.

        Args:
            X: rows ``[n, ...]``, in the order of recording within each group.
            y: class labels ``[n]``.
            groups: user of each row ``[n]``; None if all rows are of one user.

        Raises:
            ValueError: if the data are invalid, as in other estimators of scikit-learn.
            UserError: if a name is unknown, a setting is out of range, a group has one row, the strategy has no
                statistics of BN, or the model mixes rows.
        """
        rows, labels = validate_data(self, X, y, allow_nd=True, dtype=np.float32)
        check_classification_targets(labels)
        encoder = LabelEncoder().fit(labels)
        self.classes_ = encoder.classes_
        row_groups: NDArray[Any] = np.zeros(len(rows)) if groups is None else np.asarray(groups)
        if row_groups.shape != (len(rows),):
            raise UserError(f"{len(rows)} rows and groups of shape {list(row_groups.shape)}: pass one group per row")
        if len(rows) < 2:
            raise UserError("batch normalization cannot train on 1 sample: pass at least 2")
        chosen = parse_rule(self.rule)
        data = Examples(_tensor(rows), torch.as_tensor(encoder.transform(labels)).long(), torch.zeros(len(rows)).long())
        users = tuple(
            User(str(name), "", examples, examples)  # there is no evaluation
            for name in np.unique(row_groups)
            for examples in [data.take(torch.as_tensor(np.flatnonzero(row_groups == name)))]
        )
        population = Population(users, (), tuple(map(str, self.classes_)), "")
        seed = int(check_random_state(self.random_state).randint(2**31 - 1))
        plan = Plan(rounds=self.rounds, batch_size=self.batch_size, lr=self.lr, eval_every=self.rounds)
        ctx = build_context_for(
            Run("arrays", self.strategy, seed, model=self.model, task="classification", plan=plan), population
        )
        require_statistics(ctx.scratch, f"{type(self).__name__} with strategy {self.strategy!r}")
        require_batch_norm_formula(ctx.scratch, f"{type(self).__name__} with strategy {self.strategy!r}")
        local = [str(role) for role in set(ctx.ownership.roles.values()) if _is_local(ctx, role)]
        if local:
            raise UserError(
                f"strategy {self.strategy!r} keeps {', '.join(sorted(local))} local to each user, but this classifier "
                "has one network for all: choose a strategy that shares or averages them, such as global-pooled or "
                "fedbn-seeded"
            )
        require_independent_rows(ctx.scratch.eval(), data.x[:4], type(self).__name__)
        serving = federate(ctx.run, ctx=ctx).server.serving
        network = ctx.load(ctx.assemble(serving, None))
        prior = _differences(network, users) if chosen.requires == "n0" else None
        self.network_: Personalized = personalize(network, chosen, prior)
        return self

    def adapt(self, X: ArrayLike, user: Users) -> PersonalizedClassifier:
        """Update the statistics of users with unlabeled rows, one row at a time, in order.

        Args:
            X: rows ``[n, ...]``.
            user: one name for all rows, or one name per row.
        """
        rows = self._rows(X)
        names = _names(user, len(rows))
        for i in range(len(rows)):
            self.network_(rows[i : i + 1], user=names[i : i + 1])
        return self

    def predict_proba(self, X: ArrayLike, user: Users | None = None) -> NDArray[np.float64]:
        """Predict probabilities ``[n, classes]``, with the statistics of each row's user, which do not change.

        Args:
            X: rows ``[n, ...]``.
            user: one name for all rows, or one name per row. None and unknown users use the statistics of the
                population.
        """
        rows = self._rows(X)
        with self.network_.frozen():
            if user is None:
                outputs = self.network_.model(rows).detach()
            else:
                outputs = self.network_.predict(rows, user=_names(user, len(rows)))
        return outputs.double().softmax(1).numpy()

    def predict(self, X: ArrayLike, user: Users | None = None) -> NDArray[Any]:
        """Predict class labels ``[n]``; arguments as for `predict_proba`."""
        index = self.predict_proba(X, user).argmax(1)  # raises before `classes_` is read if not fitted
        return self.classes_[index]

    def _rows(self, X: ArrayLike) -> torch.Tensor:
        check_is_fitted(self)
        return _tensor(validate_data(self, X, allow_nd=True, dtype=np.float32, reset=False))


def _is_local(ctx: RunContext, role: Role) -> bool:
    return role is not Role.COUNTER and ctx.ownership.owners[role] is LOCAL


def _tensor(rows: NDArray[np.float32]) -> torch.Tensor:
    return torch.tensor(rows)  # a copy, because the array may be read-only


def _names(user: Users, rows: int) -> list[str]:
    names = [user] * rows if isinstance(user, (str, int)) else list(user)
    if len(names) != rows:
        raise UserError(f"{rows} rows and {len(names)} users: pass one name per row, or one name for all")
    return [str(name) for name in names]


def _differences(network: nn.Module, users: Sequence[User]) -> dict[str, LayerPrior]:
    """Statistics of the training users with their weight; the largest one if differences cannot be measured."""
    windows = [user.train.x for user in users if len(user.train) > 1]
    if len(windows) > 1:
        return population_prior(network, windows)
    return {path: replace(p, n0=torch.full_like(p.mean, MAX_N0)) for path, p in layer_priors(network).items()}

"""A personalized classifier with scikit-learn's interface: `fit`, `predict`, `score`, and `adapt` for one user."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.preprocessing import LabelEncoder
from sklearn.utils import check_random_state
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data

from fedbn.config import Plan
from fedbn.data.population import Examples, Population, User
from fedbn.errors import UserError
from fedbn.federation.context import RunContext
from fedbn.federation.loop import federate
from fedbn.federation.run import Run
from fedbn.federation.setup import build_context_for
from fedbn.nn.conversion import require_statistics
from fedbn.nn.roles import Role
from fedbn.online import Personalized, personalize
from fedbn.strategies.ownership import LOCAL

Users = str | int | Sequence[str | int] | NDArray[Any]


class PersonalizedClassifier(ClassifierMixin, BaseEstimator):
    """Train one network over all users, then let each user's statistics follow that user's unlabeled rows.

    `fit` federates over the groups; `predict` never changes anything; `adapt` moves one user's statistics. Rows are
    ``[n, features]`` or of any shape that the model takes, such as windows ``[n, channels, time]``.

    Args:
        model: built-in network or ``package.module:factory``; one with BN layers.
        rule: how statistics follow a user (``fedbn list rules``).
        strategy: treatment of normalization in training (``fedbn list strategies``).
        rounds: rounds of federation; with one group, epochs.
        batch_size: rows a step.
        lr: learning rate.
        random_state: of initial weights and shuffling.

    Attributes:
        classes_: labels met in `fit`.
        n_features_in_: size of the second axis of what was fitted.
        network_: the users' `fedbn.online.Personalized`.

    >>> rng = np.random.default_rng(0)
    >>> X, y = rng.normal(size=(80, 4)), np.repeat(["rest", "walk"], 40)
    >>> X[40:] += 3
    >>> shifted = X + np.repeat([[0.0], [1.0]], 40, 0).take(np.arange(80) % 2 * 40, 0)
    >>> ours = PersonalizedClassifier(rounds=5, random_state=0).fit(shifted, y, groups=np.arange(80) % 2)
    >>> ours.adapt(X, user="new").predict(X[[0, 79]], user="new").tolist()
    ['rest', 'walk']
    """

    def __init__(
        self,
        model: str = "mlp",
        rule: str = "pseudo:n0=64",
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
        """Federate over the groups; nobody's statistics have moved afterwards.

        Args:
            X: rows ``[n, ...]``, of each group in recorded order.
            y: classes ``[n]``.
            groups: whose each row is ``[n]``; None: all are one user's.

        Raises:
            ValueError: data that cannot be trained on, as scikit-learn says it.
            UserError: an unknown name, a setting out of range, a group of one row, or a strategy without statistics.
        """
        rows, labels = validate_data(self, X, y, allow_nd=True, dtype=np.float32)
        check_classification_targets(labels)
        encoder = LabelEncoder().fit(labels)
        self.classes_ = encoder.classes_
        owners: NDArray[Any] = np.zeros(len(rows)) if groups is None else np.asarray(groups)
        if owners.shape != (len(rows),):
            raise UserError(f"{len(rows)} rows and groups of shape {list(owners.shape)}: give one group a row")
        if len(rows) < 2:
            raise UserError("batch normalization cannot train on 1 sample: give at least 2")
        data = Examples(_tensor(rows), torch.as_tensor(encoder.transform(labels)).long(), torch.zeros(len(rows)).long())
        users = tuple(
            User(str(name), "", own, own)  # nothing is tested here
            for name in np.unique(owners)
            for own in [data.take(torch.as_tensor(np.flatnonzero(owners == name)))]
        )
        population = Population(users, (), tuple(map(str, self.classes_)), "")
        seed = int(check_random_state(self.random_state).randint(2**31 - 1))
        plan = Plan(rounds=self.rounds, batch_size=self.batch_size, lr=self.lr, eval_every=self.rounds)
        ctx = build_context_for(Run("arrays", self.strategy, seed, self.model, plan=plan), population)
        require_statistics(ctx.scratch, f"{type(self).__name__} with strategy {self.strategy!r}")
        at_home = [str(role) for role in set(ctx.ownership.roles.values()) if _stays(ctx, role)]
        if at_home:
            raise UserError(
                f"strategy {self.strategy!r} leaves {', '.join(sorted(at_home))} with each user, but this "
                "classifier has one network for all: choose one that shares or averages them, such as global-pooled or "
                "fedbn-seeded"
            )
        serving = federate(ctx.run, ctx=ctx).server.serving
        self.network_: Personalized = personalize(ctx.load(ctx.assemble(serving, None)), self.rule)
        return self

    def adapt(self, X: ArrayLike, user: Users) -> PersonalizedClassifier:
        """Let users' statistics follow their rows, without labels, in order; each is answered before it is learnt from.

        Args:
            X: rows ``[n, ...]``.
            user: whose: one name for all, or one a row.
        """
        rows = self._rows(X)
        names = _names(user, len(rows))
        for place in range(len(rows)):
            self.network_(rows[place : place + 1], user=names[place : place + 1])
        return self

    def predict_proba(self, X: ArrayLike, user: Users | None = None) -> NDArray[np.float64]:
        """Probabilities ``[n, classes]``, each row under its user's statistics; no statistic moves.

        Args:
            X: rows ``[n, ...]``.
            user: one name for all, or one a row; None and users never met: those of the population.
        """
        rows = self._rows(X)
        with self.network_.frozen():
            if user is None:
                outputs = self.network_.model(rows).detach()
            else:
                outputs = self.network_.predict(rows, user=_names(user, len(rows)))
        return outputs.double().softmax(1).numpy()

    def predict(self, X: ArrayLike, user: Users | None = None) -> NDArray[Any]:
        """Classes ``[n]``; arguments as of `predict_proba`."""
        best = self.predict_proba(X, user).argmax(1)  # says so if nothing is fitted
        return self.classes_[best]

    def _rows(self, X: ArrayLike) -> torch.Tensor:
        check_is_fitted(self)
        return _tensor(validate_data(self, X, allow_nd=True, dtype=np.float32, reset=False))


def _stays(ctx: RunContext, role: Role) -> bool:
    return role is not Role.COUNTER and ctx.ownership.owners[role] is LOCAL


def _tensor(rows: NDArray[np.float32]) -> torch.Tensor:
    return torch.tensor(rows)  # a copy: callers' arrays may be read-only


def _names(user: Users, rows: int) -> list[str]:
    names = [user] * rows if isinstance(user, (str, int)) else list(user)
    if len(names) != rows:
        raise UserError(f"{rows} rows and {len(names)} users: give one name a row, or one name for all")
    return [str(name) for name in names]

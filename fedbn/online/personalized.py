"""One network for many users: their rows share a batch, and each row is normalized by its user's statistics.

`Personalized.predict` records the moments of every row; only `Personalized.commit` updates the statistics, once, from
these records. ``train()`` and ``eval()`` have no effect.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor, nn

from fedbn.errors import UserError
from fedbn.nn.conversion import replace_norms, require_statistics
from fedbn.nn.plain import copy_model, plain
from fedbn.nn.roles import CLASSES, head_layer, statistics_layers
from fedbn.online.alignments.aligner import Aligner
from fedbn.online.alignments.base import split_alignment
from fedbn.online.bank import Bank, Group
from fedbn.online.layer import Pass, Transform, UserNorm, affine_entry, user_norm, write_statistics
from fedbn.online.matched import MatchedHead, record_features
from fedbn.online.prior import LayerPrior, pack_priors
from fedbn.online.rules.base import Rule, not_a_rule
from fedbn.online.rules.base import rule as parse_rule
from fedbn.online.state import BNState, fingerprint
from fedbn.online.statistics import Pair, mix, within_limits
from fedbn.online.stores import Store
from fedbn.online.users import Snapshot, Users
from fedbn.online.validation import (
    Ids,
    arange_like,
    canonical_name,
    class_weights,
    require_batch_norm_formula,
    require_finite,
    require_independent_rows,
    resolve_posterior,
    split_duplicates,
    user_names,
    validate_mask,
)

CHUNK = 512
"""Batch size of `Personalized.calibrate`."""

FADING = 0.95
"""Weight of a window relative to the next one in the mean entropies of the guard."""


@dataclass(frozen=True)
class _Prediction:
    """Records of the last prediction, for `Personalized.commit`."""

    ids: list[str]
    logits: Tensor
    adapted: Tensor
    fallback: Tensor | None
    recorded: Pass
    summaries: Pair | None


def personalize(
    model: nn.Module,
    rule: Rule | str = "source",
    prior: Mapping[str, LayerPrior] | None = None,
    capacity: int = 4096,
    duplicates: Literal["merge", "sequential"] = "merge",
    store: Store | None = None,
    classes: int | None = None,
    align: Aligner | None = None,
    head: MatchedHead | None = None,
) -> Personalized:
    """Copy of ``model`` with separate statistics for every user.

    Args:
        model: a network with BN layers of any kind and nesting; it is not changed.
        rule: rule that updates the statistics, as an object or a text such as ``pseudo:n0=64``; by default, only
            `Personalized.calibrate` changes them.
        prior: initial statistics of users by path; default: the model's running statistics. See
            `fedbn.online.prior.source_prior` and `fedbn.online.prior.population_prior`.
        capacity: maximum number of users in memory; the least recently used ones are moved to ``store``.
        duplicates: whether several rows of one user in a batch are one update with their joint moments (``merge``) or
            successive updates (``sequential``).
        store: store for users that are not in memory; None: a dict.
        classes: number of classes; None: that of a built model, or the width of its last layer.
        align: aligns the input of every user before the network (`fedbn.online.fit_alignment`).
        head: mixes its probabilities with the network's (`fedbn.online.fit_matched_head`).

    Raises:
        UserError: an unknown rule or a test-time method, a model without statistics or with layers that do not evaluate
            as BN (such as IABN), or a prior or head that does not match the model.

    >>> net = personalize(nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 3)), "pseudo:n0=8")
    >>> net(torch.ones(3, 2), user=["ann", "bob", "ann"]).shape, net.users
    (torch.Size([3, 3]), ['ann', 'bob'])
    >>> net.to_pandas()["learned"].to_dict()
    {'ann': 2.0, 'bob': 1.0}
    """
    rule = parse_rule(rule) if isinstance(rule, str) else rule
    if not isinstance(rule, Rule):
        raise not_a_rule(getattr(rule, "name", repr(rule)))
    model = plain(copy_model(model))
    require_statistics(model, f"rule {rule.name!r}")
    require_batch_norm_formula(model, f"rule {rule.name!r}")
    if duplicates not in ("merge", "sequential"):
        raise UserError(f"duplicates={duplicates!r} is unknown: use 'merge' or 'sequential'")
    if capacity < 1:
        raise UserError(f"capacity={capacity} is too small: use at least 1")
    inner = replace_norms(copy_model(model), user_norm).eval()
    layers = cast("dict[str, UserNorm]", statistics_layers(inner))
    start, spans = pack_priors(layers, prior or {})
    for index, (path, layer) in enumerate(layers.items()):
        layer.index = index
        write_statistics(layer, start.mean[0, spans[path]], start.var[0, spans[path]])
    weight, bias = (
        torch.cat([affine_entry(m, name, value) for m in layers.values()]).to(start.mean)
        for name, value in (("weight", 1.0), ("bias", 0.0))
    )
    classes, store = classes or _num_classes(model), {} if store is None else store
    bank = Bank(rule, start, (weight, bias), spans, classes, capacity, store, fingerprint(model), align)
    if head is not None:
        with record_features(inner):  # checks the last layer
            pass
    return Personalized(inner, bank, duplicates, statistics_layers(model), head)


class Personalized(Users):
    """Model with separate statistics for every user, created by `personalize`.

    Attributes:
        model: the network, with unchanged state names; without users it computes the source model.
        bank: statistics of the users.
        head: matched head, or None.
    """

    def __init__(
        self,
        model: nn.Module,
        bank: Bank,
        duplicates: str,
        plain: dict[str, nn.Module],
        head: MatchedHead | None = None,
    ) -> None:
        super().__init__(model, bank)
        self.head = head
        self._sequential = duplicates == "sequential"
        self._plain = plain
        self._spans = list(bank.spans.values())
        self._last: _Prediction | None = None
        self._checked = False
        self._frozen = False

    # ---------------------------------------------------------------- predict and commit

    def predict(self, x: Tensor, user: Ids, mask: Tensor | None = None) -> Tensor:
        """Output of the model for ``x`` ``[B, *shape]``. Statistics are not updated.

        With the rule's ``guard``, a user's predictions are those of the prior (or calibration), bit for bit, while the
        fading mean entropy of the adapted predictions is above that of the prior's, over the committed windows. This
        disables a rule that makes the network less certain, and enables it again when the entropy falls. Confident
        errors cannot be detected without labels. The guard needs a second forward pass.

        Args:
            x: rows in any order.
            user: user of each row. Unknown users are normalized by the prior and remain unknown.
            mask: ``[B, length]`` False where the last axis of a row is padding, which is excluded from statistics. The
                network itself must handle padding.

        Raises:
            UserError: not one name per row, a mask with wrong shape or an empty row, values that are not finite,
                windows of wrong shape, more users than the capacity, or, found with the first windows, a model in which
                the answer for a row depends on the other rows.
        """
        self._last = None
        ids = user_names(user, len(x))
        mask = validate_mask(mask, x)
        require_finite(x)
        self._check_once(x)
        group = self.bank.group(ids, create=False)
        rule, aligner = self.bank.rule, self.bank.aligner
        summaries = None if aligner is None else aligner.measure(x)
        x = self.bank.align(group, x)
        record = rule.includes_current or (rule.learns and not self._frozen)
        adapted, recorded = self._run(x, self._adapted_transform(group), record=record, mask=mask)
        if record and rule.learns_from_train_pass:
            _, recorded = self._run(x, self._train_transform(group), mask=mask)
        out, fallback = adapted, None
        if self.head is not None:
            with record_features(self.model) as found:
                source, _ = self._run(x, self._prior_transform(group), record=False)
            features = found[0]
        elif rule.guard:
            source, _ = self._run(x, self._prior_transform(group), record=False)
        if rule.guard:
            fallback = source
            rows = group.slots[group.row]
            uncertain = self.bank.rows["entropy"][rows] > self.bank.rows["prior_entropy"][rows]
            out = torch.where(uncertain.view(-1, *[1] * (adapted.dim() - 1)), fallback, adapted)
        if self.head is not None:
            out = self.head.mix(features, out)
        self._last = _Prediction(ids, out, adapted, fallback, recorded, summaries)
        return out

    def usable(self) -> Tensor:
        """Whether each row ``[B]`` of the last prediction can be committed: its output and its moments are valid.

        Huge windows can exceed the range of the network's numbers.

        Raises:
            UserError: no prediction since the last commit.
        """
        last = self._require_last()
        return last.logits.reshape(len(last.ids), -1).isfinite().all(1) & within_limits(*self._moments(last)[0])

    def commit(
        self, posterior: Tensor | None = None, label: Tensor | None = None, weight: Tensor | None = None
    ) -> None:
        """Update the statistics of the users in the last prediction.

        Args:
            posterior: ``[B, K]`` class probabilities, for example the softmax of the prediction.
            label: ``[B]`` true classes; -1 if unknown, in which case ``posterior`` or else the prediction is used.
            weight: ``[B]`` weight of each row in windows; rows with weight 0 are ignored.

        Raises:
            UserError: no prediction since the last commit, a wrong shape, values that are not finite, windows that are
                not `usable`, or the rule needs a posterior. No state changes.
        """
        if self._frozen:
            return
        last, usable = self._require_last(), self.usable()
        self._last = None
        if not usable.all():
            raise UserError(
                f"{int((~usable).sum())} of {len(usable)} windows are too large (first: row "
                f"{int((~usable).nonzero()[0])}): the network's numbers overflow; remove or rescale them"
            )
        posterior = resolve_posterior(self.bank, last.logits, posterior, label)
        group = self.bank.group(last.ids, create=True)
        like = self.bank.source.mean
        counts = like.new_ones(len(last.ids)) if weight is None else weight.to(like)
        if counts.shape != (len(last.ids),) or bool((counts < 0).any()):
            raise UserError(f"weight must have one number of at least 0 per row, {len(last.ids)} in total")
        if last.summaries is not None:
            z, trusted = last.summaries
            for part, rows in _rounds(group):
                self.bank.learn_alignment(part, z[rows], trusted[rows], counts[rows])
        if not self.bank.rule.learns:
            return
        if self.bank.rule.gate:
            counts = counts * (posterior.max(1).values >= self.bank.rule.gate)
        moments, positions = self._moments(last)
        if self._sequential or self.bank.rule.classwise:
            for part, rows in _rounds(group):
                self.bank.learn(part, (moments[0][rows], moments[1][rows]), positions, counts[rows], posterior[rows])
        else:
            self.bank.learn(group, moments, positions, counts, posterior)
        if last.fallback is not None:
            self._update_entropy(group, last.adapted, last.fallback)

    def forward(self, x: Tensor, user: Ids, mask: Tensor | None = None) -> Tensor:
        """`predict`, then `commit` with the softmax of the output.

        With ``duplicates="sequential"``, the first row of each user is predicted and committed before the second.
        """
        ids = user_names(user, len(x))
        if not self._sequential or self._frozen or len(set(ids)) == len(ids):
            return self._predict_and_commit(x, ids, mask)
        rounds = split_duplicates(self.bank.group(ids, create=False))
        parts = [
            self._predict_and_commit(x[rows], [ids[i] for i in rows.tolist()], None if mask is None else mask[rows])
            for rows in rounds
        ]
        return torch.cat(parts)[torch.cat(rounds).argsort()]

    @contextmanager
    def frozen(self) -> Iterator[Personalized]:
        """Context manager in which `commit` and calls do not update statistics."""
        before, self._frozen = self._frozen, True
        try:
            yield self
        finally:
            self._frozen = before

    def calibrate(
        self,
        windows: Tensor,
        user: str | int,
        labels: Tensor | None = None,
        then: Literal["freeze", "adapt"] = "freeze",
        n0: float = 2.0,
    ) -> None:
        """Initialize a user with the statistics of its own windows, for example one of each activity.

        Layers are calibrated one after another, each with the layers before it already calibrated, and merged with a
        prior of ``n0`` windows. With ``n0=0`` this is AdaBN (Li, Wang, Shi, Liu, Hou, 2016,
        https://arxiv.org/abs/1603.04779) for one user. The previous state of the user is discarded.

        Args:
            windows: ``[n, *shape]``. The choice of windows matters far more than their number.
            user: user of the windows.
            labels: ``[n]`` classes. With labels, every class has the same weight.
            then: whether to freeze these statistics or let the rule adapt them.
            n0: weight of the prior, in windows.

        Raises:
            UserError: no windows, values that are not finite, not one label per window, a class without windows, or an
                unknown ``then``.
        """
        if then not in ("freeze", "adapt"):
            raise UserError(f"then={then!r} is unknown: use 'freeze' or 'adapt'")
        if not len(windows):
            raise UserError("calibration needs windows: pass at least one, ideally one of each class")
        if n0 < 0:
            raise UserError(f"n0={n0:g} is out of range; use 0 or more")
        require_finite(windows)
        self._check_once(windows)
        weight = class_weights(self.bank, labels, len(windows))
        bank = self.bank
        aligned = None if bank.aligner is None else bank.aligner.follow(windows, bank.source.mean)
        if bank.aligner is not None and aligned is not None:
            windows = bank.aligner.apply(aligned, torch.zeros(len(windows), dtype=torch.long), windows)
        start = bank.source.moments
        mean, var = (t[0].clone() for t in start)
        share = torch.as_tensor(len(windows) / (n0 + len(windows))).to(mean)

        def transform(index: int, moments: Pair | None, positions: int) -> Pair:
            span = self._spans[index]
            return bank.transform(mean[None, span], var[None, span], span)

        group = Group([""], torch.zeros(1, dtype=torch.long), torch.zeros(len(windows), dtype=torch.long))
        for index in list(self._run(windows[:1], transform)[1].moments):
            span = self._spans[index]
            rows = [self._run(part, transform)[1].moments[index] for part in windows.split(CHUNK)]
            moments = group.merge((torch.cat([m for m, _ in rows]), torch.cat([v for _, v in rows])), weight)
            joint = mix((start[0][:, span], start[1][:, span]), moments, share)
            mean[span], var[span] = joint[0][0], joint[1][0]
        if not within_limits(mean, var):
            raise UserError("these windows are too large: the network's numbers overflow; remove or rescale them")
        slot = int(bank.group([canonical_name(user)], create=True).slots[0])
        bank.calibrate(slot, mean, var, frozen=then == "freeze")
        for name, value in (aligned or {}).items():
            bank.rows[name][slot] = value[0]

    # ---------------------------------------------------------------- restore and export

    def restore(self, snapshot: Snapshot) -> None:
        """Restore all users from a `snapshot` of this model. The last prediction can no longer be committed."""
        super().restore(snapshot)
        self._last = None

    def export(self, user: str | int) -> nn.Module:
        """Plain copy of the network with the original layer types and a user's statistics, to fold or export.

        Raises:
            UserError: the rule normalizes each window by itself, the input is aligned, or there is a matched head.
        """
        if self.bank.aligner is not None or self.head is not None:
            raise UserError(
                "a plain network cannot align its input or mix two heads: personalize without align and head, or use "
                "the personalized model"
            )
        statistics = self.statistics(user)
        plain = copy.deepcopy(self._plain)
        out = replace_norms(copy_model(self.model), lambda path, _layer: plain.get(path))
        for path, layer in statistics_layers(out).items():
            write_statistics(layer, *statistics[path])
        return out.eval()

    # ---------------------------------------------------------------- internals

    def _check_once(self, x: Tensor) -> None:
        if not self._checked and len(x):
            require_independent_rows(self.model, x, f"rule {self.bank.rule.name!r}")

    def train(self, mode: bool = True) -> Personalized:
        """No effect: only `commit` updates statistics, and dropout remains off."""
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Personalized:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.bank.apply(fn)
        self.head = None if self.head is None else self.head.to(fn)
        return self

    def _require_last(self) -> _Prediction:
        if self._last is None:
            raise UserError("nothing to commit: call predict() first, and commit() once after each")
        return self._last

    def _moments(self, last: _Prediction) -> tuple[Pair, Tensor]:
        return last.recorded.concatenated([span.stop - span.start for span in self._spans], self.bank.source.mean)

    def _predict_and_commit(self, x: Tensor, ids: list[str], mask: Tensor | None = None) -> Tensor:
        out = self.predict(x, ids, mask)
        self.commit(posterior=out.softmax(1) if out.shape == (len(x), self.bank.classes) else None)
        return out

    def _run(
        self, x: Tensor, transform: Transform, *, record: bool = True, mask: Tensor | None = None
    ) -> tuple[Tensor, Pass]:
        recorded = Pass(len(x), transform, record, mask)
        with torch.no_grad(), recorded:
            try:
                out = self.model(x)
                self._checked = True
                return out, recorded
            except RuntimeError as error:
                raise UserError(f"the model does not accept windows of shape {list(x.shape[1:])}: {error}") from None

    def _adapted_transform(self, group: Group) -> Transform:
        bank = self.bank
        rows = group.slots[group.row]
        if bank.rule.includes_current:
            together = self._batches(group)
            return lambda index, pair, n: bank.transform_with_current(together, cast(Pair, pair), n, self._spans[index])
        return self._fixed_transform(bank.rows["scale"][rows], bank.rows["shift"][rows])

    def _train_transform(self, group: Group) -> Transform:
        bank, together = self.bank, self._batches(group)
        return lambda index, pair, n: bank.transform_in_training(together, cast(Pair, pair), n, self._spans[index])

    def _batches(self, group: Group) -> Group:
        """Rows that are one batch: those of a user, or each by itself if updates are sequential."""
        if not self._sequential:
            return group
        rows = group.slots[group.row]
        return Group([""] * len(rows), rows, arange_like(rows))

    def _prior_transform(self, group: Group) -> Transform:
        prior = self.bank.prior(group.slots[group.row])
        return self._fixed_transform(*self.bank.transform(prior.mean, prior.var))

    def _fixed_transform(self, scale: Tensor, shift: Tensor) -> Transform:
        return lambda index, _moments, _positions: (scale[:, self._spans[index]], shift[:, self._spans[index]])

    def _update_entropy(self, group: Group, adapted: Tensor, fallback: Tensor) -> None:
        rows = group.sum(adapted.new_ones(len(adapted)))
        for name, logits in (("entropy", adapted), ("prior_entropy", fallback)):
            entropy = torch.special.entr(logits.softmax(1)).sum(1)
            before = self.bank.rows[name][group.slots]
            self.bank.rows[name][group.slots] = torch.lerp(
                (group.sum(entropy) / rows).to(before), before, torch.as_tensor(FADING).to(before)
            )


def _rounds(group: Group) -> Iterator[tuple[Group, Tensor | slice]]:
    """Parts of a batch in which all users differ, in order, and their rows."""
    if group.distinct:
        yield group, slice(None)
        return
    for rows in split_duplicates(group):
        users = group.row[rows]
        yield Group([group.users[i] for i in users.tolist()], group.slots[users], arange_like(rows)), rows


def _num_classes(model: nn.Module) -> int:
    if (classes := getattr(model, CLASSES, None)) is not None:
        return int(classes)
    _, last = head_layer(model)
    if not isinstance(weight := getattr(last, "weight", None), Tensor):
        raise UserError("the model has no single layer that computes its output: use personalize(..., classes=K)")
    return len(weight)


def personalized_copy(model: nn.Module, state: BNState) -> nn.Module:
    """Plain copy of ``model`` with one user's statistics in its BN layers, to fold or export.

    Args:
        model: the model that the state belongs to.
        state: state of the user.

    Raises:
        UserError: the state has another model, its input is aligned, or its rule needs priors per class (use
            `Personalized.export`).
    """
    if split_alignment(state.rule)[0]:
        raise UserError("a plain network cannot align its input: use a state without alignment")
    net = personalize(model, parse_rule(state.rule), capacity=1)
    net.load("user", state)
    return net.export("user")

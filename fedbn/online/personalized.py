"""One network for many users: their rows share a batch, and each is normalized by its own user's statistics.

Observe, predict, commit: `Personalized.predict` notes the moments of every row and answers; only
`Personalized.commit` moves statistics, once, from what was noted. Nothing hangs on ``train()`` or ``eval()``.
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
from fedbn.nn.conversion import channels_of, replace_norms, require_statistics
from fedbn.nn.roles import head, keeps_statistics, statistics_layers
from fedbn.online.bank import Bank, Group
from fedbn.online.layer import Pass, Transform, UserNorm
from fedbn.online.prior import LayerPrior, packed
from fedbn.online.rules.base import Rule
from fedbn.online.rules.base import rule as parse_rule
from fedbn.online.state import BNState, fingerprint
from fedbn.online.statistics import Pair, mix
from fedbn.online.stores import Store
from fedbn.online.users import Snapshot, Users
from fedbn.online.validation import (
    Ids,
    balance,
    in_rounds,
    names_of,
    numbered,
    real_positions,
    require_finite,
    resolve_posterior,
)

CHUNK = 512
"""Rows that a pass of `Personalized.calibrate` takes at once."""

FADING = 0.95
"""Weight of a window relative to the one after it in what the guard compares."""


@dataclass(frozen=True)
class _Note:
    """What the last prediction leaves for `Personalized.commit`."""

    ids: list[str]
    logits: Tensor
    own: Tensor
    fallback: Tensor | None
    passed: Pass


def personalize(
    model: nn.Module,
    rule: Rule | str = "pseudo",
    prior: Mapping[str, LayerPrior] | None = None,
    capacity: int = 4096,
    duplicates: Literal["merge", "sequential"] = "merge",
    store: Store | None = None,
    classes: int | None = None,
) -> Personalized:
    """A copy of ``model`` in which every user has statistics of its own.

    Args:
        model: a network with BN layers of any kind and nesting; it is not touched.
        rule: how statistics follow a user, as a value or by name, such as ``pseudo:n0=64``.
        prior: path -> what users start from, where it is not the model's running statistics; and what else is known
            (`fedbn.online.prior.source_prior`, `fedbn.online.prior.population_prior`).
        capacity: users at hand; those met longest ago go to ``store``.
        duplicates: several rows of one user in a batch are one update with their joint moments, or one update after
            the other.
        store: where users go who are not at hand; None: a dict.
        classes: width of the output; None: that of the last linear or convolutional layer.

    Raises:
        UserError: an unknown rule, the model keeps no statistics, or the prior does not fit.

    >>> net = personalize(nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 3)), "pseudo:n0=8")
    >>> net(torch.ones(3, 2), user=["ann", "bob", "ann"]).shape, net.users
    (torch.Size([3, 3]), ['ann', 'bob'])
    >>> net.to_pandas()["learnt"].to_dict()
    {'ann': 2.0, 'bob': 1.0}
    """
    rule = parse_rule(rule) if isinstance(rule, str) else rule
    require_statistics(model, f"rule {rule.name!r}")
    if duplicates not in ("merge", "sequential"):
        raise UserError(f"duplicates={duplicates!r} is unknown: write 'merge' or 'sequential'")
    if capacity < 1:
        raise UserError(f"capacity={capacity} holds no user: give at least 1")
    inner = replace_norms(copy.deepcopy(model), _user_norm).eval()
    layers = cast("dict[str, UserNorm]", statistics_layers(inner))
    start, spans = packed(layers, prior or {})
    for place, (path, layer) in enumerate(layers.items()):
        layer.place = place
        _set_statistics(layer, start.mean[0, spans[path]], start.var[0, spans[path]])
    weight, bias = (
        torch.cat([_affine(m, name, value) for m in layers.values()]).to(start.mean)
        for name, value in (("weight", 1.0), ("bias", 0.0))
    )
    bank = Bank(
        rule,
        start,
        (weight, bias),
        spans,
        classes or _width(model),
        capacity,
        {} if store is None else store,
        fingerprint(model),
    )
    plain = {path: copy.deepcopy(m) for path, m in statistics_layers(model).items()}
    return Personalized(inner, bank, duplicates, plain)


class Personalized(Users):
    """Made by `personalize`.

    Attributes:
        model: the network, state names as they were; called by itself it is the source model.
        bank: the users' statistics.
    """

    def __init__(self, model: nn.Module, bank: Bank, duplicates: str, plain: dict[str, nn.Module]) -> None:
        super().__init__(model, bank)
        self._sequential = duplicates == "sequential"
        self._plain = plain
        self._spans = list(bank.spans.values())
        self._note: _Note | None = None
        self._frozen = False

    # ---------------------------------------------------------------- predict and commit

    def predict(self, x: Tensor, user: Ids, mask: Tensor | None = None) -> Tensor:
        """The model's output for ``x`` ``[B, *shape]``; no statistic moves.

        With the rule's ``guard``, the answers of a user are the prior's (or calibrated) ones, bit for bit, exactly
        while the fading mean entropy of the adapted answers to the windows committed so far is above that of the
        prior's. So a rule that makes the network less certain than it was is stopped, and comes back by itself.
        That is all it can promise without labels: it does not see confident mistakes. It costs a second pass.

        Args:
            x: rows in any order.
            user: whose each row is. Users never met are normalized by the prior, and stay unknown.
            mask: ``[B, length]`` False where the last axis of a row is padding, which then enters no statistics; how
                the network itself treats padding is its own affair.

        Raises:
            UserError: not one name a row, a mask of another shape or with an empty row, values that are not finite,
                windows that the model does not take, more users than fit, or a model that mixes rows.
        """
        self._note = None
        ids = names_of(user, len(x))
        mask = real_positions(mask, x)
        require_finite(x)
        group = self.bank.group(ids, create=False)
        rule = self.bank.rule
        watch = rule.includes_current or (rule.learns and not self._frozen)
        own, passed = self._run(x, self._adapted(group), watch=watch, mask=mask)
        out, fallback = own, None
        if rule.guard:
            fallback, _ = self._run(x, self._unadapted(group), watch=False)
            rows = group.slots[group.row]
            doubtful = self.bank.rows["entropy"][rows] > self.bank.rows["prior_entropy"][rows]
            out = torch.where(doubtful.view(-1, *[1] * (own.dim() - 1)), fallback, own)
        self._note = _Note(ids, out, own, fallback, passed)
        return out

    def commit(
        self, posterior: Tensor | None = None, label: Tensor | None = None, weight: Tensor | None = None
    ) -> None:
        """Move the statistics of the users predicted last, from what was noted then.

        Args:
            posterior: ``[B, K]`` what the windows are believed to be, for example the softmax of the prediction.
            label: ``[B]`` what they are, -1 where not known (there ``posterior``, or else the prediction, counts).
            weight: ``[B]`` windows that each row counts as; 0: nothing is learnt from it.

        Raises:
            UserError: nothing was predicted since the last commit, a wrong shape, or the rule needs a posterior.
        """
        if self._frozen:
            return
        note, self._note = self._note, None
        if note is None:
            raise UserError("nothing to commit: call predict() first, and commit() once after each")
        belief = resolve_posterior(self.bank, note.logits, posterior, label)
        group = self.bank.group(note.ids, create=True)
        if not self.bank.rule.learns:
            return
        like = self.bank.source.mean
        counts = like.new_ones(len(note.ids)) if weight is None else weight.to(like)
        if counts.shape != (len(note.ids),) or bool((counts < 0).any()):
            raise UserError(f"weight must be one number of 0 or more a row, {len(note.ids)} in all")
        if self.bank.rule.gate:
            counts = counts * (belief.max(1).values >= self.bank.rule.gate)
        seen, positions = self._packed(note.passed)
        if self._sequential or self.bank.rule.classwise:
            for rows in in_rounds(group):
                part = Group(
                    [group.users[i] for i in group.row[rows].tolist()], group.slots[group.row[rows]], numbered(rows)
                )
                self.bank.learn(part, (seen[0][rows], seen[1][rows]), positions, counts[rows], belief[rows])
        else:
            self.bank.learn(group, seen, positions, counts, belief)
        if note.fallback is not None:
            self._doubt(group, note.own, note.fallback)

    def forward(self, x: Tensor, user: Ids, mask: Tensor | None = None) -> Tensor:
        """`predict`, then `commit` with the output's own softmax.

        With ``duplicates="sequential"`` the first row of each user is answered and learnt from before the second.
        """
        ids = names_of(user, len(x))
        if not self._sequential or self._frozen or len(set(ids)) == len(ids):
            return self._predict_and_commit(x, ids, mask)
        rounds = in_rounds(self.bank.group(ids, create=False))
        parts = [
            self._predict_and_commit(x[rows], [ids[i] for i in rows.tolist()], None if mask is None else mask[rows])
            for rows in rounds
        ]
        return torch.cat(parts)[torch.cat(rounds).argsort()]

    @contextmanager
    def frozen(self) -> Iterator[Personalized]:
        """Inside, nothing ever updates: calls answer, commits do nothing."""
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
        """Let a user start from the statistics of its own first windows, for example one of each activity.

        Layer by layer, each under the layers before it already calibrated, merged with a prior worth ``n0`` windows.
        With ``n0=0`` this is AdaBN (Li, Wang, Shi, Liu, Hou, 2016, https://arxiv.org/abs/1603.04779) for one user.
        What the user had learnt is gone.

        Args:
            windows: ``[n, *shape]``; which windows these are matters far more than how many.
            user: whose they are.
            labels: ``[n]`` classes: every class then counts the same, whatever its number of windows.
            then: keep these statistics, or let the rule go on from them.
            n0: windows that the prior is worth.

        Raises:
            UserError: no windows, values that are not finite, not one label a window, a class without windows, or an
                unknown ``then``.
        """
        if then not in ("freeze", "adapt"):
            raise UserError(f"then={then!r} is unknown: write 'freeze' or 'adapt'")
        if not len(windows):
            raise UserError("calibration needs windows: give at least one, best one of each class")
        if n0 < 0:
            raise UserError(f"n0={n0:g} is impossible; give 0 or more")
        require_finite(windows)
        weight = balance(self.bank, labels, len(windows))
        bank = self.bank
        start = bank.source.moments
        mean, var = (t[0].clone() for t in start)
        share = torch.as_tensor(len(windows) / (n0 + len(windows))).to(mean)

        def now(place: int, moments: Pair | None, positions: int) -> Pair:
            of = self._spans[place]
            return bank.transform(mean[None, of], var[None, of], of)

        order = list(self._run(windows[:1], now)[1].seen)
        for place in order:
            of = self._spans[place]
            rows = [self._run(part, now)[1].seen[place] for part in windows.split(CHUNK)]
            met = Group([""], torch.zeros(1, dtype=torch.long), torch.zeros(len(windows), dtype=torch.long)).merge(
                (torch.cat([m for m, _ in rows]), torch.cat([v for _, v in rows])), weight
            )
            joint = mix((start[0][:, of], start[1][:, of]), met, share)
            mean[of], var[of] = joint[0][0], joint[1][0]
        slot = int(bank.group([str(user)], create=True).slots[0])
        bank.calibrate(slot, mean, var, frozen=then == "freeze")

    # ---------------------------------------------------------------- a user's own network

    def restore(self, snapshot: Snapshot) -> None:
        """All users as they were at a `snapshot` of this network; what was predicted since cannot be committed."""
        super().restore(snapshot)
        self._note = None

    def export(self, user: str | int) -> nn.Module:
        """A plain copy of the network, of the original layer types, with a user's statistics; it folds and exports.

        Raises:
            UserError: the rule normalizes each window by itself.
        """
        statistics = self.statistics(user)
        out = replace_norms(
            copy.deepcopy(self.model),
            lambda path, layer: copy.deepcopy(self._plain[path]) if isinstance(layer, UserNorm) else None,
        )
        for path, layer in statistics_layers(out).items():
            _set_statistics(layer, *statistics[path])
        return out.eval()

    # ---------------------------------------------------------------- inside

    def train(self, mode: bool = True) -> Personalized:
        """Nothing: statistics move by `commit` alone, and dropout stays off."""
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Personalized:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.bank.apply(fn)
        return self

    def _predict_and_commit(self, x: Tensor, ids: list[str], mask: Tensor | None = None) -> Tensor:
        out = self.predict(x, ids, mask)
        self.commit(posterior=out.softmax(1) if out.shape == (len(x), self.bank.classes) else None)
        return out

    def _run(
        self, x: Tensor, transform: Transform, *, watch: bool = True, mask: Tensor | None = None
    ) -> tuple[Tensor, Pass]:
        passed = Pass(len(x), transform, watch, mask)
        with torch.no_grad(), passed:
            try:
                return self.model(x), passed
            except RuntimeError as error:
                raise UserError(f"the model does not take windows of shape {list(x.shape[1:])}: {error}") from None

    def _adapted(self, group: Group) -> Transform:
        bank = self.bank
        rows = group.slots[group.row]
        if bank.rule.includes_current:
            alone = Group([""] * len(rows), rows, numbered(rows)) if self._sequential else group
            return lambda place, pair, n: bank.statistics_with_current(alone, cast(Pair, pair), n, self._spans[place])
        return self._fixed((bank.rows["scale"][rows], bank.rows["shift"][rows]))

    def _unadapted(self, group: Group) -> Transform:
        prior = self.bank.prior(group.slots[group.row])
        return self._fixed(self.bank.transform(prior.mean, prior.var))

    def _fixed(self, pair: Pair) -> Transform:
        scale, shift = pair

        def at(place: int, moments: Pair | None, positions: int) -> Pair:
            return scale[:, self._spans[place]], shift[:, self._spans[place]]

        return at

    def _packed(self, passed: Pass) -> tuple[Pair, Tensor]:
        """Row moments of all layers side by side, and the positions behind them; 0 for layers that did not run."""
        like = self.bank.source.mean
        widths = [of.stop - of.start for of in self._spans]
        nothing = [like.new_zeros(passed.rows, width) for width in widths]
        pairs = [passed.seen.get(place, (empty, empty)) for place, empty in enumerate(nothing)]
        positions = [like.new_full((width,), passed.positions.get(i, 0)) for i, width in enumerate(widths)]
        return (torch.cat([m for m, _ in pairs], 1), torch.cat([v for _, v in pairs], 1)), torch.cat(positions)

    def _doubt(self, group: Group, own: Tensor, fallback: Tensor) -> None:
        rows = group.sum(own.new_ones(len(own)))
        for name, logits in (("entropy", own), ("prior_entropy", fallback)):
            entropy = torch.special.entr(logits.softmax(1)).sum(1)
            before = self.bank.rows[name][group.slots]
            self.bank.rows[name][group.slots] = torch.lerp(
                (group.sum(entropy) / rows).to(before), before, torch.as_tensor(FADING).to(before)
            )


def _user_norm(path: str, layer: nn.Module) -> nn.Module | None:
    if not keeps_statistics(layer):
        return None
    return UserNorm(
        channels_of(layer),
        eps=float(getattr(layer, "eps", 1e-5)),
        affine=getattr(layer, "weight", None) is not None,
    )


def _affine(layer: nn.Module, name: str, otherwise: float) -> Tensor:
    value = getattr(layer, name, None)
    return torch.full_like(cast(Tensor, layer.running_mean), otherwise) if value is None else value.detach()


def _set_statistics(layer: nn.Module, mean: Tensor, var: Tensor) -> None:
    with torch.no_grad():
        cast(Tensor, layer.running_mean).copy_(mean)
        cast(Tensor, layer.running_var).copy_(var)


def _width(model: nn.Module) -> int:
    path = head(model)
    if path is None:
        raise UserError("the model has no linear or convolutional layer: say personalize(..., classes=K)")
    return len(cast(Tensor, model.get_submodule(path).weight))


def personalized_copy(model: nn.Module, state: BNState) -> nn.Module:
    """A copy of ``model`` without a bank, with one user's statistics in its BN layers, to fold and export.

    Args:
        model: the model that the state was measured with.
        state: the user's statistics.

    Raises:
        UserError: the state is of another model, or its rule needs priors per class (use `Personalized.export`).
    """
    net = personalize(model, parse_rule(state.rule), capacity=1)
    net.load("user", state)
    return net.export("user")

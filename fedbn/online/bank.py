"""The statistics of many users, packed: one row a user, the channels of all layers side by side.

Row 0 belongs to nobody and always holds what a new user starts from. Users who have not been met lately give their
row to others and go to a store, from which they come back when they are met again.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from fedbn.errors import UserError
from fedbn.online.layer import scale_and_shift
from fedbn.online.rules.base import Rule
from fedbn.online.state import BNState
from fedbn.online.statistics import Pair, Prior, State, WindowStatistics, columns, each
from fedbn.online.stores import Store
from fedbn.plugins import render
from fedbn.statistics.moments import Moments

COUNTERS = ("offered", "learnt", "entropy", "prior_entropy")
"""Numbers kept for each user besides what its rule keeps."""


@dataclass(frozen=True)
class Group:
    """Which rows of a batch belong to whom.

    Attributes:
        users: the different users, in the order of their first rows.
        slots: ``[U]`` their rows in the bank; 0 for users who are not known.
        row: ``[B]`` index into ``users`` of every row of the batch.
    """

    users: list[str]
    slots: Tensor
    row: Tensor

    @property
    def distinct(self) -> bool:
        """Whether every row is of another user; ``row`` then counts from 0."""
        return len(self.users) == len(self.row)

    def sum(self, values: Tensor) -> Tensor:
        """``[B, ...]`` summed by user, ``[U, ...]``."""
        if self.distinct:
            return values
        return values.new_zeros((len(self.users), *values.shape[1:])).index_add_(0, self.row, values)

    def merge(self, seen: Pair, weight: Tensor) -> Pair:
        """Moments of all rows of each user together, ``[U, C]``, rows weighted; NaN where no row has weight."""
        if self.distinct:
            return seen
        mean, var = seen
        total = self.sum(weight)[:, None]
        joint = self.sum(weight[:, None] * mean) / total
        spread = self.sum(weight[:, None] * (var + (mean - joint[self.row]) ** 2)) / total
        return joint, spread


class Bank:
    """Rows of users.

    Args:
        rule: how states are kept.
        prior: what users start from, one row.
        affine: ``[C]`` scale and shift of the layers.
        spans: path -> columns of each layer.
        classes: K.
        capacity: rows kept at hand.
        store: where the others go.
        model: fingerprint of the network.
    """

    def __init__(
        self,
        rule: Rule,
        prior: Prior,
        affine: Pair,
        spans: dict[str, slice],
        classes: int,
        capacity: int,
        store: Store,
        model: str,
    ) -> None:
        self.rule, self.text = rule, render(rule)
        self.source, self.affine, self.spans, self.classes = prior, affine, spans, classes
        self.capacity, self.store, self.model = capacity, store, model
        start = rule.start(prior, classes)
        one = {f.name: getattr(start, f.name) for f in fields(State)}
        one |= {"base_mean": prior.mean, "base_var": prior.var, "frozen": torch.zeros(1, device=prior.mean.device) > 0}
        one |= {name: prior.mean.new_zeros(1) for name in COUNTERS}
        one |= {"scale": torch.zeros_like(prior.mean), "shift": torch.zeros_like(prior.mean)}
        self.rows: dict[str, Tensor] = one
        self.slot: OrderedDict[str, int] = OrderedDict()
        self.free: list[int] = []
        self.refresh(torch.zeros(1, dtype=torch.long))
        self.blank = {name: t.clone() for name, t in self.rows.items()}

    # ---------------------------------------------------------------- who is where

    def group(self, ids: Sequence[str], *, create: bool) -> Group:
        """Find the users of a batch; users in the store come back, and with ``create`` unknown ones get a row.

        Raises:
            UserError: more different users than the bank has room for.
        """
        place: dict[str, int] = {}
        row = [place.setdefault(user, len(place)) for user in ids]
        wanted = [u for u in place if u in self.slot or create or u in self.store]
        if len(wanted) > self.capacity:
            raise UserError(
                f"{len(wanted)} users in one batch and room for {self.capacity}: raise capacity, or split the batch"
            )
        for user in wanted:
            if user in self.slot:
                self.slot.move_to_end(user)
        for user in wanted:
            if user not in self.slot:
                self._admit(user)
        device = self.source.mean.device
        slots = torch.tensor([self.slot.get(u, 0) for u in place], dtype=torch.long, device=device)
        return Group(list(place), slots, torch.tensor(row, dtype=torch.long, device=device))

    def _admit(self, user: str) -> None:
        if len(self.slot) >= self.capacity:
            oldest, slot = next(iter(self.slot.items()))
            self._keep(oldest)
            del self.slot[oldest]
            self.free.append(slot)
        if not self.free:
            used = len(self.rows["t"])
            more = min(used, self.capacity + 1 - used)
            for name, rows in self.rows.items():
                self.rows[name] = torch.cat([rows, self.blank[name].expand(more, *rows.shape[1:])])
            self.free = list(range(used + more - 1, used - 1, -1))
        slot = self.free.pop()
        if user in self.store:
            self.put(slot, BNState.from_bytes(self.store[user], self.model, self.text))
        else:
            self.clear(slot)
        self.slot[user] = slot

    def _keep(self, user: str) -> None:
        self.store[user] = self.get(self.slot[user]).to_bytes(self.source.mean.dtype)

    def flush(self) -> None:
        """Write everybody at hand to the store."""
        for user in self.slot:
            self._keep(user)

    def apply(self, function: Callable[[Tensor], Tensor]) -> None:
        """Move every tensor to another device or floating type."""
        self.source = each(self.source, lambda _, t: function(t))
        self.affine = function(self.affine[0]), function(self.affine[1])
        self.rows = {name: function(t) for name, t in self.rows.items()}
        self.blank = {name: function(t) for name, t in self.blank.items()}

    def drop(self, user: str) -> None:
        """Forget that a user was ever met."""
        if user in self.slot:
            self.free.append(self.slot.pop(user))
        self.store.pop(user, None)

    def clear(self, slot: int) -> None:
        """Back to the start."""
        for name, rows in self.rows.items():
            rows[slot] = self.blank[name][0]

    # ---------------------------------------------------------------- rows as values

    def prior(self, at: Tensor) -> Prior:
        """What the users in slots ``at`` started from."""
        return replace(self.source, mean=self.rows["base_mean"][at], var=self.rows["base_var"][at])

    def states(self, at: Tensor) -> State:
        """The states in slots ``at``."""
        return State(**{f.name: self.rows[f.name][at] for f in fields(State)})

    def write(self, at: Tensor, state: State) -> None:
        """Put states into slots ``at``."""
        for f in fields(State):
            self.rows[f.name][at] = getattr(state, f.name)
        self.refresh(at)

    def refresh(self, at: Tensor) -> None:
        """Compute scale and shift of the rows ``at`` again."""
        self.rows["scale"][at], self.rows["shift"][at] = self.transform(*self.statistics(at))

    def statistics(self, at: Tensor) -> Pair:
        """Mean and variance in use, ``[U, C]`` each."""
        prior = self.prior(at)
        return self._unless_frozen(at, prior, self.rule.statistics(prior, self.states(at)))

    def transform(self, mean: Tensor, var: Tensor, of: slice = slice(None)) -> Pair:
        """Scale and shift for statistics of the columns ``of``."""
        weight, bias = self.affine
        return scale_and_shift(mean, var, self.source.eps[of], weight[of], bias[of])

    def _unless_frozen(self, at: Tensor, prior: Prior, pair: Pair) -> Pair:
        frozen = self.rows["frozen"][at][:, None]
        return torch.where(frozen, prior.mean, pair[0]), torch.where(frozen, prior.var, pair[1])

    # ---------------------------------------------------------------- rules at work

    def statistics_with_current(self, group: Group, seen: Pair, positions: int, of: slice) -> Pair:
        """Scale and shift of the columns ``of`` with the users' rows inside their own statistics; nothing is kept."""
        weight = group.sum(seen[0].new_ones(len(group.row)))
        at = group.slots
        prior, state = columns(self.prior(at), of), columns(self.states(at), of)
        group_prior = self.rule.heard(columns(self.prior(at[group.row]), of), seen)
        heard = WindowStatistics(
            *group.merge(group_prior, seen[0].new_ones(len(group.row))), torch.full_like(prior.eps, positions)
        )
        nothing = torch.zeros_like(state.classes)
        pair = self.rule.statistics(prior, self.rule.update(prior, state, heard, weight, nothing))
        scale, shift = self.transform(*self._unless_frozen(at, prior, pair), of)
        return scale[group.row], shift[group.row]

    def learn(self, group: Group, seen: Pair, positions: Tensor, weight: Tensor, posterior: Tensor) -> None:
        """Update the states of the users of a batch at once.

        Args:
            group: whose rows.
            seen: row moments, ``[B, C]`` each.
            positions: ``[C]`` values behind them; 0 for layers that did not run, whose columns stay as they are.
            weight: ``[B]`` 0 or more.
            posterior: ``[B, K]``; zeros where nothing is known.
        """
        total = group.sum(weight)
        moving = ~self.rows["frozen"][group.slots]
        self.rows["offered"][group.slots] += group.sum(torch.ones_like(weight)) * moving
        active = moving & (total > 0)
        at, total = group.slots[active], total[active]
        if not len(at):
            return
        mean, var = group.merge(self.rule.heard(self.prior(group.slots[group.row]), seen), weight)
        classes = group.sum(weight[:, None] * posterior)[active]
        belief = classes / total[:, None]
        before = self.states(at)
        after = self.rule.update(
            self.prior(at), before, WindowStatistics(mean[active], var[active], positions), total, belief
        )
        ran = positions > 0
        self.rows["learnt"][at] += total
        self.write(
            at,
            replace(
                after,
                t=before.t + 1,
                classes=before.classes + classes,
                mean=torch.where(ran, after.mean, before.mean),
                var=torch.where(ran, after.var, before.var),
            ),
        )

    # ---------------------------------------------------------------- one user

    def get(self, slot: int) -> BNState:
        """One row as a value."""
        row = {name: rows[slot].detach().cpu() for name, rows in self.rows.items()}
        calibrated = self.calibrated(slot)
        return BNState(
            parts={
                path: tuple(Moments.from_variance(*p) for p in zip(row["n"], row["mean"][:, of], row["var"][:, of]))
                for path, of in self.spans.items()
            },
            base={
                path: Moments.from_variance(1, row["base_mean"][of], row["base_var"][of])
                for path, of in self.spans.items()
                if calibrated
            },
            extra={path: row["extra"][:, of] for path, of in self.spans.items()},
            classes=row["classes"].double(),
            tally={name: float(row[name]) for name in ("t", *COUNTERS)},
            frozen=bool(row["frozen"]),
            rule=self.text,
            model=self.model,
        )

    def put(self, slot: int, state: BNState) -> None:
        """A value into one row. Parts that hold no window start where the rule starts them.

        Raises:
            UserError: the state belongs to another model or rule.
        """
        state.require(self.model, self.text)
        self.clear(slot)
        for path, of in self.spans.items():
            if path in state.base:
                self._set("base_mean", slot, of, state.base[path].mean)
                self._set("base_var", slot, of, state.base[path].variance())
        at = torch.tensor([slot], device=self.source.mean.device)
        start = self.rule.start(self.prior(at), self.classes)
        for f in fields(State):
            self.rows[f.name][at] = getattr(start, f.name)
        for path, of in self.spans.items():
            for p, moments in enumerate(state.parts[path]):
                self.rows["n"][slot, p] = moments.n
                if moments.n > 0:
                    self.rows["mean"][slot, p, of] = moments.mean.to(self.rows["mean"])
                    self.rows["var"][slot, p, of] = moments.variance().to(self.rows["var"])
            if state.extra[path].numel():
                self._set("extra", slot, (slice(None), of), state.extra[path])
        self._set("classes", slot, slice(None), state.classes)
        for name, value in state.tally.items():
            self.rows[name][slot] = value
        self.rows["frozen"][slot] = state.frozen
        self.refresh(at)

    def _set(self, name: str, slot: int, where: slice | tuple[slice, slice], value: Tensor) -> None:
        rows = self.rows[name]
        rows[slot][where] = value.to(rows)

    def calibrated(self, slot: int) -> bool:
        """Whether a user starts from statistics of its own."""
        return not all(torch.equal(self.rows[b][slot], self.blank[b][0]) for b in ("base_mean", "base_var"))

    def calibrate(self, slot: int, mean: Tensor, var: Tensor, *, frozen: bool) -> None:
        """Let one user start from ``mean`` and ``var``, ``[C]``, instead of the prior; what it had learnt goes."""
        self.clear(slot)
        at = torch.tensor([slot], device=mean.device)
        self.rows["base_mean"][slot], self.rows["base_var"][slot], self.rows["frozen"][slot] = mean, var, frozen
        self.write(at, self.rule.start(self.prior(at), self.classes))

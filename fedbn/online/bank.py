"""Statistics of many users in one table: one row per user, with the channels of all layers concatenated.

Row 0 is the template for new users. The least recently used rows are evicted to a store and reloaded on demand.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from fedbn.errors import UserError
from fedbn.online.alignments.aligner import Aligner
from fedbn.online.layer import scale_and_shift
from fedbn.online.records import BASE, Records
from fedbn.online.rules.base import Rule
from fedbn.online.state import TALLY, BNState, invalid_state
from fedbn.online.statistics import Pair, Prior, State, WindowStatistics, map_tensors, slice_channels
from fedbn.online.stores import Store
from fedbn.plugins import render
from fedbn.statistics.moments import Moments

COUNTERS = tuple(name for name in TALLY if name != "t")
"""Values per user in addition to the state of the rule."""

DERIVED = ("scale", "shift")
"""Values per user that are computed from the others."""


@dataclass(frozen=True)
class Group:
    """Assigns the rows of a batch to users.

    Attributes:
        users: the different users, in the order of their first rows.
        slots: ``[U]`` their rows in the bank; 0 for unknown users.
        row: ``[B]`` index into ``users`` for each row of the batch.
    """

    users: list[str]
    slots: Tensor
    row: Tensor

    @property
    def distinct(self) -> bool:
        """Whether all rows belong to different users; ``row`` then counts from 0."""
        return len(self.users) == len(self.row)

    def sum(self, values: Tensor) -> Tensor:
        """``[B, ...]`` summed by user, ``[U, ...]``."""
        if self.distinct:
            return values
        return values.new_zeros((len(self.users), *values.shape[1:])).index_add_(0, self.row, values)

    def merge(self, moments: Pair, weight: Tensor) -> Pair:
        """Joint moments of the weighted rows of each user, ``[U, C]``; NaN where all weights are 0."""
        if self.distinct:
            return moments
        mean, var = moments
        total = self.sum(weight)[:, None]
        joint_mean = self.sum(weight[:, None] * mean) / total
        joint_var = self.sum(weight[:, None] * (var + (mean - joint_mean[self.row]) ** 2)) / total
        return joint_mean, joint_var


class Bank:
    """Table of users.

    Args:
        rule: rule that updates the states.
        prior: initial statistics of users, one row.
        affine: ``[C]`` weight and bias of the layers.
        spans: columns of each layer, by path.
        classes: number of classes K.
        capacity: maximum number of users in memory.
        store: store for evicted users.
        model: fingerprint of the network.
        aligner: aligns the input of users; None: the input is not changed.

    Attributes:
        changed: users whose state is not in the store yet.
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
        aligner: Aligner | None = None,
    ) -> None:
        self.rule = rule
        self.rule_text = render(rule) if aligner is None else f"{render(aligner.alignment)}+{render(rule)}"
        self.aligner = None if aligner is None else aligner.to(lambda t: t.to(prior.mean.device))
        self.source, self.affine, self.spans, self.classes = prior, affine, spans, classes
        self.capacity, self.store, self.model = capacity, store, model
        start = rule.start(prior, classes)
        self.rows: dict[str, Tensor] = {f.name: getattr(start, f.name) for f in fields(State)}
        self.rows |= {"base_mean": prior.mean, "base_var": prior.var}
        self.rows |= {"frozen": torch.zeros(1, device=prior.mean.device) > 0}
        self.rows |= {name: prior.mean.new_zeros(1) for name in COUNTERS}
        self.rows |= {name: torch.zeros_like(prior.mean) for name in ("scale", "shift")}
        self.rows |= self.aligner.start(prior.mean) if self.aligner is not None else {}
        self.slot: OrderedDict[str, int] = OrderedDict()
        self.free: list[int] = []
        self.changed: set[str] = set()
        self.refresh(torch.zeros(1, dtype=torch.long))
        self.template = {name: t.clone() for name, t in self.rows.items()}
        self.records = self._records()

    # ---------------------------------------------------------------- users

    def group(self, ids: Sequence[str], *, create: bool) -> Group:
        """Find the rows of a batch's users. Loads them from the store.

        Args:
            ids: user of each row.
            create: whether the caller changes the users' states. Adds unknown users.

        Raises:
            UserError: more different users than the capacity.
            DamagedRecordError: the stored state of a user is damaged.
        """
        index: dict[str, int] = {}
        row = [index.setdefault(user, len(index)) for user in ids]
        needed = [u for u in index if u in self.slot or create or u in self.store]
        if len(needed) > self.capacity:
            raise UserError(
                f"{len(needed)} users in one batch exceed the capacity of {self.capacity}: raise it, or split the batch"
            )
        for user in needed:
            if user in self.slot:
                self.slot.move_to_end(user)
        for user in needed:
            if user not in self.slot:
                self._load(user)
        if create:
            self.changed.update(index)
        device = self.source.mean.device
        slots = torch.tensor([self.slot.get(u, 0) for u in index], dtype=torch.long, device=device)
        return Group(list(index), slots, torch.tensor(row, dtype=torch.long, device=device))

    def _load(self, user: str) -> None:
        record = self.store.get(user)
        row = None if record is None else self.records.unpack(record)
        if len(self.slot) >= self.capacity:
            oldest = next(iter(self.slot))
            if oldest in self.changed:
                self._save([oldest])
            self.free.append(self.slot.pop(oldest))
        if not self.free:
            used = len(self.rows["t"])
            more = min(used, self.capacity + 1 - used)
            for name, rows in self.rows.items():
                self.rows[name] = torch.cat([rows, self.template[name].expand(more, *rows.shape[1:])])
            self.free = list(range(used + more - 1, used - 1, -1))
        slot = self.free.pop()
        self.clear(slot)
        if row is not None:
            self._fill(slot, row)
        self.slot[user] = slot

    def _fill(self, slot: int, row: dict[str, Tensor]) -> None:
        """Write the row of a record to a cleared row. Parts without windows get the rule's initial values."""
        slots = torch.tensor([slot], device=self.source.mean.device)
        for name in BASE:
            if name in row:
                self.rows[name][slot] = row[name].to(self.rows[name])
        start = self.rule.start(self.prior(slots), self.classes)
        used = (row["n"] > 0)[:, None]
        row |= {name: torch.where(used, row[name], getattr(start, name)[0].cpu()) for name in ("mean", "var")}
        for name, value in row.items():
            self.rows[name][slot] = value.to(self.rows[name])
        self.refresh(slots)

    def _save(self, users: Sequence[str]) -> None:
        slots = torch.tensor([self.slot[u] for u in users], dtype=torch.long, device=self.source.mean.device)
        self.store.update(zip(users, self.records.pack(self.rows, slots), strict=True))
        self.changed.difference_update(users)

    def flush(self) -> None:
        """Write the users that have changed to the store."""
        if self.changed:
            self._save([user for user in self.changed if user in self.slot])

    def _records(self) -> Records:
        stored = {name: t for name, t in self.template.items() if name not in DERIVED}
        return Records(stored, self.model, self.rule_text)

    def apply(self, function: Callable[[Tensor], Tensor]) -> None:
        """Apply a function to every tensor, e.g. to move it to another device."""
        self.source = map_tensors(self.source, lambda _, t: function(t))
        self.affine = function(self.affine[0]), function(self.affine[1])
        self.aligner = None if self.aligner is None else self.aligner.to(function)
        self.rows = {name: function(t) for name, t in self.rows.items()}
        self.template = {name: function(t) for name, t in self.template.items()}
        self.records = self._records()

    def drop(self, user: str) -> None:
        """Delete a user from memory and store."""
        if user in self.slot:
            self.free.append(self.slot.pop(user))
        self.changed.discard(user)
        self.store.pop(user, None)

    def clear(self, slot: int) -> None:
        """Reset one row to the template."""
        for name, rows in self.rows.items():
            rows[slot] = self.template[name][0]

    # ---------------------------------------------------------------- rows

    def prior(self, slots: Tensor) -> Prior:
        """Initial statistics of the users in rows ``slots``."""
        return replace(self.source, mean=self.rows["base_mean"][slots], var=self.rows["base_var"][slots])

    def states(self, slots: Tensor) -> State:
        """States in rows ``slots``."""
        return State(**{f.name: self.rows[f.name][slots] for f in fields(State)})

    def write(self, slots: Tensor, state: State) -> None:
        """Write states to rows ``slots``."""
        for f in fields(State):
            self.rows[f.name][slots] = getattr(state, f.name)
        self.refresh(slots)

    def refresh(self, slots: Tensor) -> None:
        """Recompute scale and shift of rows ``slots``."""
        self.rows["scale"][slots], self.rows["shift"][slots] = self.transform(*self.statistics(slots))

    def statistics(self, slots: Tensor) -> Pair:
        """Current mean and variance, ``[U, C]`` each."""
        prior = self.prior(slots)
        return self._unless_frozen(slots, prior, self.rule.statistics(prior, self.states(slots)))

    def transform(self, mean: Tensor, var: Tensor, span: slice = slice(None)) -> Pair:
        """Scale and shift for statistics of the columns ``span``."""
        weight, bias = self.affine
        return scale_and_shift(mean, var, self.source.eps[span], weight[span], bias[span])

    def _unless_frozen(self, slots: Tensor, prior: Prior, pair: Pair) -> Pair:
        frozen = self.rows["frozen"][slots][:, None]
        return torch.where(frozen, prior.mean, pair[0]), torch.where(frozen, prior.var, pair[1])

    # ---------------------------------------------------------------- updates

    def transform_with_current(self, group: Group, moments: Pair, positions: int, span: slice) -> Pair:
        """Scale and shift of the columns ``span`` if statistics include the current rows; the state is unchanged."""
        ones, slots = moments[0].new_ones(len(group.row)), group.slots
        prior, state = slice_channels(self.prior(slots), span), slice_channels(self.states(slots), span)
        clipped = self.rule.clip_moments(slice_channels(self.prior(slots[group.row]), span), moments)
        window = WindowStatistics(*group.merge(clipped, ones), torch.full_like(prior.eps, positions))
        after = self.rule.update(prior, state, window, group.sum(ones), torch.zeros_like(state.classes))
        pair = self.rule.statistics(prior, after)
        scale, shift = self.transform(*self._unless_frozen(slots, prior, pair), span)
        return scale[group.row], shift[group.row]

    def transform_in_training(self, group: Group, moments: Pair, positions: int, span: slice) -> Pair:
        """Scale and shift of the columns ``span`` as in BN's training mode: by the statistics of a user's current rows.

        A user with a single value per channel keeps its own statistics, because a single value has no variance.
        """
        ones = moments[0].new_ones(len(group.row))
        batch = self.transform(*group.merge(moments, ones), span)
        own = (self.rows[name][group.slots][:, span] for name in ("scale", "shift"))
        several = (positions * group.sum(ones) > 1)[:, None]
        scale, shift = (torch.where(several, b, o)[group.row] for b, o in zip(batch, own, strict=True))
        return scale, shift

    def learn(self, group: Group, moments: Pair, positions: Tensor, weight: Tensor, posterior: Tensor) -> None:
        """Update the states of all users of a batch.

        Args:
            group: users of the rows.
            moments: row moments, ``[B, C]`` each.
            positions: ``[C]`` number of values behind them; 0 for layers that did not run, which do not change.
            weight: ``[B]`` weights of the rows, not negative.
            posterior: ``[B, K]``; zeros if unknown.
        """
        total = group.sum(weight)
        adaptive = ~self.rows["frozen"][group.slots]
        self.rows["offered"][group.slots] += group.sum(torch.ones_like(weight)) * adaptive
        active = adaptive & (total > 0)
        slots, total = group.slots[active], total[active]
        if not len(slots):
            return
        mean, var = group.merge(self.rule.clip_moments(self.prior(group.slots[group.row]), moments), weight)
        classes = group.sum(weight[:, None] * posterior)[active]
        before = self.states(slots)
        window = WindowStatistics(mean[active], var[active], positions)
        after = self.rule.update(self.prior(slots), before, window, total, classes / total[:, None])
        self.rows["learned"][slots] += total
        mean, var = (torch.where(positions > 0, a, b) for a, b in ((after.mean, before.mean), (after.var, before.var)))
        self.write(slots, replace(after, t=before.t + 1, classes=before.classes + classes, mean=mean, var=var))

    # ---------------------------------------------------------------- alignment

    def align(self, group: Group, x: Tensor) -> Tensor:
        """Windows ``[B, *shape]``, each aligned for its user."""
        return x if self.aligner is None else self.aligner.apply(self.rows, group.slots[group.row], x)

    def learn_alignment(self, group: Group, z: Tensor, usable: Tensor, weight: Tensor) -> None:
        """Update the alignments of different users with the summaries of one window each (`Aligner.measure`)."""
        if self.aligner is not None:
            adaptive = ~self.rows["frozen"][group.slots]
            self.aligner.learn(self.rows, group.slots, z, usable, weight * adaptive)

    # ---------------------------------------------------------------- one user

    def get(self, slot: int) -> BNState:
        """State of one row."""
        row = {name: rows[slot].detach().cpu().clone() for name, rows in self.rows.items()}
        calibrated = self.calibrated(slot)
        return BNState(
            parts={
                path: tuple(Moments.from_variance(*p) for p in zip(row["n"], row["mean"][:, span], row["var"][:, span]))
                for path, span in self.spans.items()
            },
            base={
                path: Moments.from_variance(1, row["base_mean"][span], row["base_var"][span])
                for path, span in self.spans.items()
                if calibrated
            },
            extra={path: row["extra"][:, span] for path, span in self.spans.items()},
            classes=row["classes"].double(),
            tally={name: float(row[name]) for name in TALLY},
            frozen=bool(row["frozen"]),
            rule=self.rule_text,
            model=self.model,
            alignment={} if self.aligner is None else self.aligner.get(self.rows, slot),
        )

    def check(self, state: BNState) -> None:
        """Check that a state can be written to a row.

        Raises:
            UserError: the state belongs to another model or rule, or is not valid.
        """
        state.require(self.model, self.rule_text)
        widths = {path: span.stop - span.start for path, span in self.spans.items()}
        state.validate(widths, self.rows["n"].shape[1], self.rows["extra"].shape[1], self.classes)
        if not (self.aligner.check(state.alignment) if self.aligner is not None else not state.alignment):
            raise invalid_state("its alignment has other entries than this one, or values that are out of range")

    def put(self, slot: int, state: BNState) -> None:
        """Write a state to one row. Parts without windows get the rule's initial values.

        Raises:
            UserError: as for `check`; the row does not change.
        """
        self.check(state)
        self.clear(slot)
        for path, span in self.spans.items():
            if path in state.base:
                self._set("base_mean", slot, span, state.base[path].mean)
                self._set("base_var", slot, span, state.base[path].variance())
        slots = torch.tensor([slot], device=self.source.mean.device)
        self.write(slots, self.rule.start(self.prior(slots), self.classes))
        # A released state has windows in some layers only.
        counts = torch.stack([torch.stack([m.n for m in parts]) for parts in state.parts.values()])
        self._set("n", slot, slice(None), counts.amax(0))
        for path, span in self.spans.items():
            for p, moments in enumerate(state.parts[path]):
                if moments.n > 0:
                    self.rows["mean"][slot, p, span] = moments.mean.to(self.rows["mean"])
                    self.rows["var"][slot, p, span] = moments.variance().to(self.rows["var"])
            if state.extra[path].numel():
                self._set("extra", slot, (slice(None), span), state.extra[path])
        self._set("classes", slot, slice(None), state.classes)
        for name in TALLY:
            self.rows[name][slot] = state.tally[name]
        self.rows["frozen"][slot] = state.frozen
        if self.aligner is not None:
            self.aligner.put(self.rows, slot, state.alignment)
        self.refresh(slots)

    def _set(self, name: str, slot: int, index: slice | tuple[slice, slice], value: Tensor) -> None:
        rows = self.rows[name]
        rows[slot][index] = value.to(rows)

    def calibrated(self, slot: int) -> bool:
        """Whether a user has statistics from calibration."""
        return not all(torch.equal(self.rows[b][slot], self.template[b][0]) for b in ("base_mean", "base_var"))

    def calibrate(self, slot: int, mean: Tensor, var: Tensor, *, frozen: bool) -> None:
        """Replace the prior of one user by ``mean`` and ``var``, ``[C]``, and reset its state."""
        self.clear(slot)
        slots = torch.tensor([slot], device=mean.device)
        self.rows["base_mean"][slot], self.rows["base_var"][slot], self.rows["frozen"][slot] = mean, var, frozen
        self.write(slots, self.rule.start(self.prior(slots), self.classes))

"""Access to the users of a personalized model: states, reports and snapshots."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from fedbn.errors import UserError, unknown
from fedbn.online.bank import COUNTERS, Bank
from fedbn.online.state import BNState
from fedbn.online.statistics import Pair
from fedbn.online.validation import canonical_name

if TYPE_CHECKING:
    import pandas as pd

MAX_ROWS = 20
"""Number of users in the representation of a model."""


@dataclass(frozen=True)
class Snapshot:
    """Copy of the states of all users."""

    rows: dict[str, Tensor]
    slot: dict[str, int]
    free: list[int]
    stored: dict[str, bytes]


class Users(nn.Module):
    """Base of `fedbn.online.personalized.Personalized`: access to the states of users.

    Attributes:
        model: the network.
        bank: the users' statistics.
    """

    def __init__(self, model: nn.Module, bank: Bank) -> None:
        super().__init__()
        self.model = model
        self.bank = bank

    @property
    def users(self) -> list[str]:
        """Names of all known users, including those in the store."""
        return sorted({*self.bank.slot, *self.bank.store})

    def state(self, user: str | int) -> BNState:
        """State of a user; for unknown users, the initial state."""
        return self.bank.get(int(self._slot(user)))

    def load(self, user: str | int, state: BNState) -> None:
        """Set the state of a user.

        Raises:
            UserError: the state has another model or rule, or is not valid; no state changes.
        """
        self.bank.check(state)
        self.bank.put(int(self.bank.group([canonical_name(user)], create=True).slots[0]), state)

    def merge(self, user: str | int, state: BNState) -> None:
        """Merge another state into the state of a user.

        Raises:
            UserError: as for `load`; also if the merged state is not valid.
        """
        self.bank.check(state)
        self.load(user, self.state(user).merge(state))

    def reset(self, user: str | int) -> None:
        """Reset a user to the initial state, including calibration. The user remains known."""
        self.bank.clear(int(self.bank.group([canonical_name(user)], create=True).slots[0]))

    def forget(self, user: str | int) -> None:
        """Delete a user, also from the store.

        Raises:
            UserError: unknown user.
        """
        name = canonical_name(user)
        if name not in self.bank.slot and name not in self.bank.store:
            raise unknown("user", name, self.users)
        self.bank.drop(name)

    def flush(self) -> None:
        """Write the users that have changed to the store."""
        self.bank.flush()

    def snapshot(self) -> Snapshot:
        """Copy of the states of all users, for `restore`."""
        bank = self.bank
        rows = {name: t.clone() for name, t in bank.rows.items()}
        return Snapshot(rows, dict(bank.slot), list(bank.free), dict(bank.store))

    def restore(self, snapshot: Snapshot) -> None:
        """Restore all users from a `snapshot` of this model."""
        bank = self.bank
        bank.rows = {name: t.clone() for name, t in snapshot.rows.items()}
        bank.slot, bank.free = OrderedDict(snapshot.slot), list(snapshot.free)
        bank.store.clear()
        bank.store.update(snapshot.stored)
        bank.changed = set(bank.slot)

    def statistics(self, user: str | int) -> dict[str, Pair]:
        """Current mean and variance ``[C]`` of a user, by layer.

        Raises:
            UserError: the rule normalizes each window by itself.
        """
        bank = self.bank
        slot = self._slot(user)
        if not bank.rule.keeps_state and not bool(bank.rows["frozen"][slot]):
            raise UserError(
                f"rule {bank.rule.name!r} normalizes every window by itself, so a user has no statistics to show or "
                "export; choose a rule with a state (pseudo, ema, cumulative, ...), or calibrate and freeze"
            )
        mean, var = bank.statistics(slot)
        return {path: (mean[0, span], var[0, span]) for path, span in bank.spans.items()}

    def report(self, user: str | int) -> dict[str, Any]:
        """Report on a user: counts, class diversity, and the distance of each layer's statistics from the prior.

        ``statistics`` shows which statistics predict at present (``prior`` only with the rule's ``guard``). ``moved``
        is the symmetric Kullback-Leibler divergence of Gaussians from the prior, averaged over the channels of a layer.
        """
        bank = self.bank
        slot = self._slot(user)
        row = {name: float(bank.rows[name][slot]) for name in ("t", *COUNTERS)}
        has_statistics = bank.rule.keeps_state or bool(bank.rows["frozen"][slot])
        return {
            "offered": row["offered"],
            "learned": row["learned"],
            "updates": row["t"],
            "windows": float(bank.rows["n"][slot].sum()),
            "diversity": float(bank.states(slot).diversity()),
            "frozen": bool(bank.rows["frozen"][slot]),
            "calibrated": bank.calibrated(int(slot)),
            "statistics": "prior" if row["entropy"] > row["prior_entropy"] else "adapted",
            "moved": self._divergence(user) if has_statistics else {},
        } | ({} if bank.aligner is None else {"alignment": bank.aligner.report(bank.rows, int(slot))})

    def to_pandas(self) -> pd.DataFrame:
        """Table of the users in memory, with the main entries of `report`. The store is not read."""
        import pandas as pd

        columns = ["learned", "windows", "diversity", "frozen", "calibrated", "statistics"]
        rows = {user: {k: v for k, v in self.report(user).items() if k in columns} for user in sorted(self.bank.slot)}
        return pd.DataFrame.from_dict(rows, orient="index", columns=columns).rename_axis("user")

    def __repr__(self) -> str:
        return f"{self._headline()}\n{self.to_pandas().to_string(max_rows=MAX_ROWS)}"

    def _repr_html_(self) -> str:
        return f"<p>{escape(self._headline())}</p>{self.to_pandas().to_html(max_rows=MAX_ROWS)}"

    def _headline(self) -> str:
        users = f"{len(self.users)} users, {len(self.bank.slot)} in memory"
        return f"{type(self.model).__name__} personalized with {self.bank.rule_text}: {users}"

    def _slot(self, user: str | int) -> Tensor:
        return self.bank.group([canonical_name(user)], create=False).slots

    def _divergence(self, user: str | int) -> dict[str, float]:
        start = self.bank.source.moments
        divergence = {}
        for path, (mean, var) in self.statistics(user).items():
            mean0, var0 = (t[0, self.bank.spans[path]].double() for t in start)
            a, b = var.double() + 1e-12, var0 + 1e-12
            divergence[path] = float(0.5 * (a / b + b / a - 2 + (mean - mean0) ** 2 * (1 / a + 1 / b)).mean())
        return divergence

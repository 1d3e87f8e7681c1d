"""Users of one network: their states, how they stand, all of them at one moment."""

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

if TYPE_CHECKING:
    import pandas as pd

SHOWN = 20
"""Users that are listed where a network is shown."""


@dataclass(frozen=True)
class Snapshot:
    """Everything `Users` know of its users at one moment."""

    rows: dict[str, Tensor]
    slot: dict[str, int]
    free: list[int]
    stored: dict[str, bytes]


class Users(nn.Module):
    """What `fedbn.online.personalized.Personalized` knows of its users, apart from how it learns it.

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
        """Everybody ever met, those in the store included."""
        return sorted({*self.bank.slot, *self.bank.store})

    def state(self, user: str | int) -> BNState:
        """A user's state as a value; of users never met, what they would start from."""
        return self.bank.get(int(self._slot(user)))

    def load(self, user: str | int, state: BNState) -> None:
        """Give a user a state.

        Raises:
            UserError: the state is of another model or rule.
        """
        state.require(self.bank.model, self.bank.text)
        self.bank.put(int(self.bank.group([str(user)], create=True).slots[0]), state)

    def merge(self, user: str | int, state: BNState) -> None:
        """Add the windows behind another state to a user's."""
        self.load(user, self.state(user).merge(state))

    def reset(self, user: str | int) -> None:
        """A user is as on the first day, calibration included; it stays known."""
        self.bank.clear(int(self.bank.group([str(user)], create=True).slots[0]))

    def forget(self, user: str | int) -> None:
        """Delete everything about a user, in the store too.

        Raises:
            UserError: nobody of that name was ever met.
        """
        if str(user) not in self.users:
            raise unknown("user", str(user), self.users)
        self.bank.drop(str(user))

    def flush(self) -> None:
        """Write everybody at hand to the store."""
        self.bank.flush()

    def snapshot(self) -> Snapshot:
        """All users, to come back to with `restore`."""
        bank = self.bank
        rows = {name: t.clone() for name, t in bank.rows.items()}
        return Snapshot(rows, dict(bank.slot), list(bank.free), dict(bank.store))

    def restore(self, snapshot: Snapshot) -> None:
        """All users as they were at a `snapshot` of this network."""
        bank = self.bank
        bank.rows = {name: t.clone() for name, t in snapshot.rows.items()}
        bank.slot, bank.free = OrderedDict(snapshot.slot), list(snapshot.free)
        bank.store.clear()
        bank.store.update(snapshot.stored)

    def statistics(self, user: str | int) -> dict[str, Pair]:
        """Mean and variance ``[C]`` in use for a user, by layer.

        Raises:
            UserError: the rule normalizes each window by itself.
        """
        bank = self.bank
        slot = self._slot(user)
        if not bank.rule.keeps and not bool(bank.rows["frozen"][slot]):
            raise UserError(
                f"rule {bank.rule.name!r} normalizes every window by itself, so a user has no statistics to show or "
                "export; choose a rule that keeps them (pseudo, ema, cumulative, ...), or calibrate and freeze"
            )
        mean, var = bank.statistics(slot)
        return {path: (mean[0, of], var[0, of]) for path, of in bank.spans.items()}

    def report(self, user: str | int) -> dict[str, Any]:
        """How a user stands: counts, class diversity, and per layer how far its statistics are from the prior.

        ``moved`` is the symmetric Kullback-Leibler divergence of Gaussians, mean over a layer's channels.
        """
        bank = self.bank
        slot = self._slot(user)
        row = {name: float(bank.rows[name][slot]) for name in ("t", *COUNTERS)}
        keeps = bank.rule.keeps or bool(bank.rows["frozen"][slot])
        return {
            "offered": row["offered"],
            "learnt": row["learnt"],
            "updates": row["t"],
            "windows": float(bank.rows["n"][slot].sum()),
            "diversity": float(bank.states(slot).diversity()),
            "frozen": bool(bank.rows["frozen"][slot]),
            "calibrated": bank.calibrated(int(slot)),
            "answers": "prior" if row["entropy"] > row["prior_entropy"] else "adapted",
            "moved": self._moved(user) if keeps else {},
        }

    def to_pandas(self) -> pd.DataFrame:
        """How the users at hand stand, one line each, as `report` says it of one; the store is not read."""
        import pandas as pd

        shown = ["learnt", "windows", "diversity", "frozen", "calibrated", "answers"]
        lines = {user: {k: v for k, v in self.report(user).items() if k in shown} for user in sorted(self.bank.slot)}
        return pd.DataFrame.from_dict(lines, orient="index", columns=shown).rename_axis("user")

    def __repr__(self) -> str:
        return f"{self._headline()}\n{self.to_pandas().to_string(max_rows=SHOWN)}"

    def _repr_html_(self) -> str:
        return f"<p>{escape(self._headline())}</p>{self.to_pandas().to_html(max_rows=SHOWN)}"

    def _headline(self) -> str:
        known = f"{len(self.users)} users known, {len(self.bank.slot)} at hand"
        return f"{type(self.model).__name__} personalized by {self.bank.text}: {known}"

    def _slot(self, user: str | int) -> Tensor:
        return self.bank.group([str(user)], create=False).slots

    def _moved(self, user: str | int) -> dict[str, float]:
        start = self.bank.source.moments
        moved = {}
        for path, (mean, var) in self.statistics(user).items():
            mean0, var0 = (t[0, self.bank.spans[path]].double() for t in start)
            a, b = var.double() + 1e-12, var0 + 1e-12
            moved[path] = float(0.5 * (a / b + b / a - 2 + (mean - mean0) ** 2 * (1 / a + 1 / b)).mean())
        return moved

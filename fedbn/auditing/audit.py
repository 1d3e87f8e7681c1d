"""Audit a model before training: owners of all entries, and common mistakes in averaging normalized networks.

Most mistakes with normalization in federated learning raise no error: a key without ``bn`` in its name is shared by
accident, a counter becomes a fraction, statistics are not sent. All of them can be detected from the model alone. A
*lint* checks for one mistake and yields findings. No lint changes the model.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from html import escape
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from fedbn.auditing.lints import LEVELS, LINTS, Finding
from fedbn.auditing.subject import Subject
from fedbn.config import parts
from fedbn.errors import UserError
from fedbn.models import build
from fedbn.models.inspection import inspect_model
from fedbn.nn.plain import copy_model
from fedbn.nn.roles import has_head, set_head
from fedbn.personalization.treatment import Treatment, treatment
from fedbn.strategies.base import NormStrategy
from fedbn.strategies.global_naive import GlobalNaive
from fedbn.strategies.ownership import Ownership

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Entry:
    """An entry of the state dict; bytes down and up are per client and round.

    Attributes:
        shape: None for an uninitialized lazy layer, which counts as 0 bytes.
    """

    key: str
    role: str
    owner: str
    shape: tuple[int, ...] | None
    dtype: str
    bytes: int
    bytes_down: int
    bytes_up: int

    @property
    def layer(self) -> str:
        """Path of the module of the entry."""
        return self.key.rpartition(".")[0]


@dataclass(frozen=True, repr=False)
class Audit:
    """Audit of a model and a strategy: entries, totals per role (`Ownership.rows`) and findings, most severe first."""

    model: str
    strategy: str
    batch_size: int
    shape: tuple[int, ...] | None
    entries: tuple[Entry, ...]
    totals: tuple[dict[str, Any], ...]
    findings: tuple[Finding, ...]

    @property
    def bytes(self) -> int:
        """Size of the state dict in bytes."""
        return sum(e.bytes for e in self.entries)

    @property
    def bytes_down(self) -> int:
        """Bytes sent from the server to a client per round."""
        return sum(e.bytes_down for e in self.entries)

    @property
    def bytes_up(self) -> int:
        """Bytes sent from a client to the server per round."""
        return sum(e.bytes_up for e in self.entries)

    def as_dict(self) -> dict[str, Any]:
        """The audit as plain values, for JSON."""
        totals = {"bytes": self.bytes, "bytes_down": self.bytes_down, "bytes_up": self.bytes_up}
        return asdict(self) | totals

    def to_pandas(self) -> pd.DataFrame:
        """The entries as a table, one row per state key."""
        import pandas as pd

        return pd.DataFrame([asdict(e) for e in self.entries]).set_index("key")

    def __repr__(self) -> str:
        lines = [f"- {f.level}, {f.lint}: {f.message}\n  fix: {f.fix}" for f in self.findings]
        return "\n".join([self._headline(), self._by_role().to_string(index=False), *lines])

    def _repr_html_(self) -> str:
        items = "".join(
            f"<li><b>{escape(f.level)}, {escape(f.lint)}</b>: {escape(f.message)}<br>fix: {escape(f.fix)}</li>"
            for f in self.findings
        )
        return f"<p>{escape(self._headline())}</p>{self._by_role().to_html(index=False)}<ul>{items}</ul>"

    def _headline(self) -> str:
        counts = [f"{n} {level}{'s' * (n > 1)}" for level in LEVELS if (n := self._count(level))]
        traffic = f"{self.bytes:,} bytes, {self.bytes_down:,} down and {self.bytes_up:,} up per client and round"
        return f"{self.model} with {self.strategy}: {traffic}; {', '.join(counts) or 'no findings'}"

    def _count(self, level: str) -> int:
        return sum(f.level == level for f in self.findings)

    def _by_role(self) -> pd.DataFrame:
        import pandas as pd

        return pd.DataFrame(self.totals)


def audit(
    model: nn.Module,
    strategy: NormStrategy | Treatment | str | None = None,
    *,
    batch_size: int = 32,
    shape: tuple[int, ...] | None = None,
    head: str = "",
    private: str = "",
    data: tuple[Tensor, Tensor] | None = None,
) -> Audit:
    """List owners and bytes of a model's entries and run the lints; the model is not changed.

    Args:
        model: the model, already prepared by the strategy (`audit_model` prepares it).
        strategy: strategy that defines the owners, optionally with a personalization method, as an object or by name
            such as ``fedbn+fedper``; None for FedAvg over the whole state (``global-naive``).
        batch_size: training batch size.
        shape: shape of one example. If given, a copy of the model runs small batches, which find its head and measure
            how many values each normalization layer receives.
        head: paths of the layers that form the head, comma-separated; empty: the last layer before the logits, or
            without ``shape`` the last registered one.
        private: paths of layers that stay local to each client, comma-separated.
        data: examples ``[n, *shape]`` of one client's training data and their classes ``[n]``, to compare the accuracy
            of a trained model under batch statistics with that under its running statistics.

    Raises:
        UserError: if ``batch_size`` or ``shape`` is below one, the strategy is unknown, a path matches nothing, or a
            state entry does not belong to a module.

    >>> net = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))
    >>> report = audit(net, shape=(4,))
    >>> report.bytes, report.bytes_up  # the counter is not sent
    (148, 140)
    >>> [f.lint for f in report.findings if f.level == "warning"]
    ['one-value', 'name-misses']
    """
    if batch_size < 1:
        raise UserError(f"batch size {batch_size} is impossible; use at least 1")
    if shape is not None and (not shape or min(shape) < 1):
        raise UserError(f"an example of shape {list(shape)} is empty; specify the shape as, e.g., 3,32,32")
    chosen = _treatment(strategy)
    is_complete = not any(is_lazy(v) for v in model.state_dict(keep_vars=True).values())
    if is_complete and (head or (shape is not None and not has_head(model))):
        model = copy_model(model)
        if shape is not None:
            model = inspect_model(model, shape, None, parts(head))
        else:
            set_head(model, parts(head))
    state = model.state_dict(keep_vars=True)
    ownership = Ownership.of(model, chosen, parts(private))
    sent = set(ownership.travels)
    entries = tuple(
        Entry(
            key,
            str(ownership.roles[key]),
            str(ownership.owner(key)),
            None if is_lazy(value) else ownership.shapes[key],
            str(value.dtype).removeprefix("torch."),
            ownership.sizes[key],
            ownership.sizes[key] if key in sent else 0,
            ownership.sizes[key] if key in sent else 0,
        )
        for key, value in state.items()
    )
    subject = Subject(model, state, ownership, chosen.norm, batch_size, shape, data)
    findings = [finding for lint in LINTS for finding in lint(subject)]
    return Audit(
        type(model).__name__,
        str(chosen),
        batch_size,
        shape,
        entries,
        tuple(ownership.rows()),
        tuple(sorted(findings, key=lambda f: LEVELS.index(f.level))),
    )


def audit_model(
    text: str,
    strategy_text: str | None = None,
    shape: tuple[int, ...] | None = None,
    classes: int = 10,
    *,
    batch_size: int = 32,
    head: str = "",
    private: str = "",
) -> Audit:
    """Build a model by name, prepare it with the strategy, and audit the result.

    Args:
        text: built-in name or ``package.module:factory``.
        strategy_text: strategy such as ``groupnorm:groups=4`` or ``fedbn+fedper``; None for FedAvg over the whole state
            of the unprepared model.
        shape: shape of one example; optional for a factory that does not take it.
        classes: number of classes.
        batch_size: training batch size.
        head: as in `audit`.
        private: as in `audit`.

    Raises:
        UserError: if the model or the strategy is unknown, the module cannot be imported, the object is not a factory,
            the factory needs other arguments or raises, the strategy does not apply to the model, or a path matches
            nothing.

    >>> audit_model("mlp", "fedbn", (1, 8, 8)).bytes_up
    9640
    """
    chosen = None if strategy_text is None else treatment(strategy_text)
    model = build(text, shape or (), classes, seed=0, head=head)
    if chosen is not None:
        model = chosen.norm.prepare_model(model)
    return replace(audit(model, chosen, batch_size=batch_size, shape=shape, private=private), model=text)


def _treatment(strategy: NormStrategy | Treatment | str | None) -> Treatment:
    if isinstance(strategy, str):
        return treatment(strategy)
    return strategy if isinstance(strategy, Treatment) else Treatment(strategy or GlobalNaive())

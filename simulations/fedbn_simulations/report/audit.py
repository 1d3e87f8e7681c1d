"""An audit in the terminal: state entries, totals per role, findings with their fixes.

A ResNet-50 has 320 entries, so each layer takes a single line, and equal consecutive blocks such as ``layer1.1`` and
``layer1.2`` are merged into ``layer1.[1-2]`` with their total bytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from rich.console import Console, Group
from rich.padding import Padding
from rich.text import Text

from fedbn.auditing.audit import LEVELS, Audit, Entry, Finding
from fedbn.nn.roles import Role
from fedbn_simulations.report.layout import fitted_table
from fedbn_simulations.results.formatting import format_count, format_size

STYLES = {"error": "bold red", "warning": "bold yellow", "note": "bold cyan"}

BYTES = {"bytes": "bytes", "down": "bytes_down", "up": "bytes_up"}
"""Columns of bytes, and the field that holds each."""

MAX_NAMES = 4
"""Number of layers that a finding lists by name."""


def show(audit: Audit, console: Console | None = None, *, full: bool = False) -> None:
    """Print state, totals and findings.

    Args:
        audit: the audit to show.
        console: output console; the terminal if None.
        full: print one line per entry, and name every layer of a finding.
    """
    console = console or Console()
    table = entry_table if full else layer_table
    console.print(table(audit, console.width), "")
    console.print(role_table(audit, console.width), "")
    show_findings(audit.findings, console, full=full)


def show_findings(findings: Sequence[Finding], console: Console, *, full: bool = False) -> None:
    """Print findings, most severe first; ``full`` names every layer."""
    if not findings:
        console.print(Text("No findings.", style="bold green"))
    for level in LEVELS:
        selected = [f for f in findings if f.level == level]
        if selected:
            console.print(Text(format_count(len(selected), level), style=STYLES[level]))
        for finding in selected:
            _print(finding, console, full)


def _print(finding: Finding, console: Console, full: bool) -> None:
    where = finding.where if full else finding.where[:MAX_NAMES]
    console.print(Padding(Text(f"{finding.lint}: {finding.message}"), (0, 0, 0, 2), expand=False))
    if where:
        more = len(finding.where) - len(where)
        names = ", ".join(name or "the model itself" for name in where) + (f" and {more} more" if more else "")
        console.print(Padding(Text(f"in {names}", style="dim"), (0, 0, 0, 6), expand=False))
    console.print(Padding(Text(f"fix: {finding.fix}", style="green"), (0, 0, 0, 6), expand=False))


def entry_table(audit: Audit, width: int) -> Group:
    """One line per state entry."""
    rows = [
        {
            "entry": e.key,
            "role": e.role,
            "owner": e.owner,
            "shape": _shape(e),
            "type": e.dtype,
            "bytes": format_size(e.bytes),
            "travels": format_size(e.bytes_up),
        }
        for e in audit.entries
    ]
    return _table(audit, rows, width, optional=("type", "shape"))


def layer_table(audit: Audit, width: int) -> Group:
    """One line per layer; equal consecutive blocks are merged, and their bytes are added."""
    rows = [
        {
            "layer": path or "(the model itself)",
            "roles and owners": _owners(copies[0]),
            "shape": _shape(max(copies[0], key=lambda e: len(e.shape or ()))),
            "bytes": format_size(sum(e.bytes for entries in copies for e in entries)),
            "travels": format_size(sum(e.bytes_up for entries in copies for e in entries)),
        }
        for path, copies in _collapsed(_tree(audit.entries), ())
    ]
    return _table(audit, rows, width, optional=("shape", "bytes"))


def role_table(audit: Audit, width: int) -> Group:
    """Owner, entries and bytes of each role."""
    rows = [
        {
            "role": row["role"],
            "owner": row["owner"],
            "entries": f"{row['entries']:,}",
            "elements": f"{row['elements']:,}",
            **{name: format_size(row[key]) for name, key in BYTES.items()},
        }
        for row in audit.totals
    ]
    entries, elements = (f"{sum(row[name] for row in audit.totals):,}" for name in ("entries", "elements"))
    total = {name: format_size(getattr(audit, key)) for name, key in BYTES.items()}
    rows.append({"role": "total", "owner": "", "entries": entries, "elements": elements, **total})
    title = "Per role; bytes down and up are per client and round"
    return fitted_table(rows, width, title=title, right=("entries", "elements", *BYTES))


def _table(audit: Audit, rows: list[dict[str, str]], width: int, optional: Sequence[str]) -> Group:
    return fitted_table(
        rows,
        width,
        optional=optional,
        title=f"{audit.model} with {audit.strategy}",
        caption="travels: bytes in each direction, per client and round.",
        right=("bytes", "travels"),
    )


def _shape(entry: Entry) -> str:
    return "lazy" if entry.shape is None else "×".join(map(str, entry.shape)) or "scalar"


def _owners(layer: Iterable[Entry]) -> str:
    """Roles by owner; the counter, which is always local, only if there are no other entries."""
    entries = list(layer)
    shown = [e for e in entries if e.role != Role.COUNTER] or entries
    owners = dict.fromkeys(e.owner for e in shown)
    return "; ".join(f"{', '.join(dict.fromkeys(e.role for e in shown if e.owner == o))} {o}" for o in owners)


@dataclass
class _Node:
    """A module: its own entries and its children."""

    entries: list[Entry] = field(default_factory=list)
    children: dict[str, _Node] = field(default_factory=dict)

    def structure(self) -> tuple[object, ...]:
        """Equal for modules of equal structure, roles, owners and shapes."""
        own = tuple((e.key.rpartition(".")[2], e.role, e.owner, e.shape, e.dtype) for e in self.entries)
        return own, tuple((name, child.structure()) for name, child in self.children.items())


def _tree(entries: Iterable[Entry]) -> _Node:
    root = _Node()
    for entry in entries:
        node = root
        for part in entry.layer.split(".") if entry.layer else ():
            node = node.children.setdefault(part, _Node())
        node.entries.append(entry)
    return root


def _collapsed(node: _Node, path: tuple[str, ...], *equals: _Node) -> list[tuple[str, list[list[Entry]]]]:
    """Lines (path, entries of each copy) of a module and its equal modules ``equals``."""
    lines = [(".".join(path), [n.entries for n in (node, *equals)])] if node.entries else []
    names = list(node.children)
    while names:
        first = names[0]
        structure = node.children[first].structure()
        run = [first]
        while first.isdigit() and len(run) < len(names) and _follows(run[-1], names[len(run)]):
            if node.children[names[len(run)]].structure() != structure:
                break
            run.append(names[len(run)])
        copies = [n.children[name] for n in (node, *equals) for name in run]
        label = first if len(run) == 1 else f"[{first}-{run[-1]}]"
        lines += _collapsed(copies[0], (*path, label), *copies[1:])
        names = names[len(run) :]
    return lines


def _follows(name: str, after: str) -> bool:
    return after.isdigit() and int(after) == int(name) + 1

"""What a study of personalisation found: table in the terminal, parquet, JSON and a picture."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from itertools import product
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from fedbn.prequential import Trace, cost, faded, harmed, regret, score, windows_to_close, worst_decile
from simulations.inference import adjust, estimate, mean_of_users, signed_rank
from simulations.numerals import bracket, number
from simulations.personalise import Results, Study
from simulations.personalise_cells import BOUNDS, SOURCE, Cell
from simulations.plots import INK, PALETTE, png
from simulations.store import code_digest, versions, write_atomically

PARTS = (0.5, 0.8, 0.9)
"""Shares of the gap to the class-balanced bound whose closing is timed."""


def label(cell: Cell) -> str:
    """What a row is called.

    >>> from fedbn.run import Run
    >>> label(Cell(Run("hapt", "fedbn"), "unseen", "iid", "recording", "source"))
    'source, from recording'
    """
    return cell.rule if cell.start == "cold" else f"{cell.rule}, from {cell.start}"


def users_frame(results: Results) -> pd.DataFrame:
    """One line a person, seed, stream and rule: all measures of one trace."""
    lines = [
        {"seed": c.run.seed, "stream": c.stream, "start": c.start, "rule": c.rule, "label": label(c), "user": t.user}
        | asdict(score(t))
        for c, (traces, _) in results.items()
        for t in traces
    ]
    return pd.DataFrame(lines)


def summary(results: Results, users: pd.DataFrame) -> pd.DataFrame:
    """One line a stream and rule: means with intervals over people, harm, regret, tests against the source, cost.

    Args:
        results: of a study.
        users: their `users_frame`.
    """
    lines: list[dict[str, Any]] = []
    for (stream, name), part in users.groupby(["stream", "label"], sort=False):
        base = users[(users["stream"] == stream) & (users["label"] == SOURCE)]
        table, ground = (f.pivot_table(index="user", columns="seed", values="accuracy") for f in (part, base))
        ground = ground.loc[table.index, table.columns]
        found = estimate(mean_of_users, table.to_numpy())
        gains = (table - ground).to_numpy()
        gain = estimate(mean_of_users, gains)
        mine = {c: r for c, r in results.items() if (c.stream, label(c)) == (stream, name)}
        facts = [f for _, f in mine.values()]
        pairs = [(part[part["seed"] == s], base[base["seed"] == s]) for s in table.columns]
        sizes = [f["bytes_per_user"] for f in facts if f["bytes_per_user"] is not None]
        spent = cost([t for traces, _ in mine.values() for t in traces], max(sizes, default=math.nan))
        lines.append(
            {
                "stream": stream,
                "rule": name,
                "accuracy": found.value,
                "low": found.users.low,
                "high": found.users.high,
                "macro_f1": mean_of_users(part.pivot_table("macro_f1", "user", "seed").to_numpy()).item(),
                "faded_accuracy": mean_of_users(part.pivot_table("faded_accuracy", "user", "seed").to_numpy()).item(),
                "faded_f1": mean_of_users(part.pivot_table("faded_f1", "user", "seed").to_numpy()).item(),
                "worst_decile": float(np.mean([worst_decile(list(a["accuracy"])) for a, _ in pairs])),
                "worst": float(table.min(axis=None)),
                "harmed": harmed(*(pd.concat([pair[i]["accuracy"] for pair in pairs]).tolist() for i in (0, 1))),
                "gain": gain.value,
                "gain_low": gain.users.low,
                "gain_high": gain.users.high,
                "p": math.nan if name == SOURCE or name in BOUNDS else signed_rank(np.nanmean(gains, axis=1)),
                "nll": mean_of_users(part.pivot_table("nll", "user", "seed").to_numpy()).item(),
                "ece": mean_of_users(part.pivot_table("ece", "user", "seed").to_numpy()).item(),
                **_against_bounds(results, mine),
                **_drift(facts),
                "questions": _mean([n for f in facts for n in f.get("questions", {}).values()]),
                "forgotten": _mean([f["forgotten"] for f in facts]),
                "reset_exact": all(f["reset_exact"] in (None, True) for f in facts),
                "peeks": any(f["peeks"] for f in facts),
                **asdict(spent),
                "users": found.n_users,
                "seeds": found.n_seeds,
            }
        )
    frame = pd.DataFrame(lines)
    # Corrected over everything that is tested, all streams together.
    frame["p_adjusted"] = adjust(frame["p"])
    return frame


def _against_bounds(results: Results, mine: Results) -> dict[str, float | int | None]:
    """Regret against both bounds, and windows to close the gap to the balanced one, over all seeds together."""

    def of(text: str) -> list[Trace]:
        return [t for c in mine for t in results[Cell(c.run, c.people, c.stream, "cold", text)][0]]

    traces = [t for found, _ in mine.values() for t in found]
    out: dict[str, float | int | None] = {
        f"regret_{bound.removeprefix('bound-')}": regret(traces, of(SOURCE), of(bound)) for bound in BOUNDS
    }
    for part in PARTS:
        out[f"windows_to_{part:.0%}"] = windows_to_close(part, traces, of(SOURCE), of("bound-balanced"))
    return out


def _drift(facts: Sequence[dict[str, Any]]) -> dict[str, float]:
    """How well alarms fitted changes, over all people and seeds; NaN for rules that are not watched."""
    found = [alarms for f in facts for alarms in f.get("alarms", [])]
    return {
        "drift_delay": _mean([d for alarms in found for d in alarms["delays"]]),
        "drift_missed": _mean([alarms["missed"] for alarms in found]),
        "false_alarms_per_1000": _mean([alarms["false_per_1000"] for alarms in found]),
    }


def _mean(values: Sequence[float | None]) -> float:
    known = [v for v in values if v is not None]
    return float(np.mean(known)) if known else math.nan


def summary_table(found: pd.DataFrame, study: Study) -> Table:
    """Rules down, kinds of stream across: mean accuracy [interval], worst tenth, share harmed."""
    people = f"{found['users'].max()} people, {study.seeds} seed{'s' if study.seeds > 1 else ''}"
    table = Table(
        title=Text(f"Accuracy on new people's streams [95 % over people], worst tenth, harmed; {people}", style="bold"),
        title_justify="left",
        caption=Text(
            "harmed: share more than a point below source. bound-…: oracles, statistics of the whole stream or of "
            "equally many windows of each class. °: a window is inside its own statistics. "
            "*: differs from source, corrected p < .05.",
            style="dim",
        ),
        caption_justify="left",
        box=SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    kinds = list(dict.fromkeys(found["stream"]))
    table.add_column("rule", overflow="fold")
    for kind in kinds:
        table.add_column(kind, overflow="fold")
    lines = found.set_index(["rule", "stream"])
    for name in sorted(dict.fromkeys(found["rule"]), key=lambda n: n in BOUNDS):
        cells = [_shown(lines.loc[(name, kind)]) for kind in kinds]
        mark = "°" if lines.loc[(name, kinds[0])]["peeks"] else ""
        table.add_row(Text(name + mark), *map(Text, cells))
    return table


def _shown(line: Any) -> str:
    star = "*" if line["p_adjusted"] < 0.05 else ""
    mean = f"{number(line['accuracy'])}{star} {bracket(line['low'], line['high'])}".rstrip()
    return f"{mean}\n{number(line['worst_decile'])} worst, {line['harmed']:.0%} harmed"


def course(results: Results, longest: float = 0.9) -> pd.DataFrame:
    """Fading accuracy at each window, mean over people and seeds, while most are there.

    The band is the 95 % interval (normal) of the paired difference to the source, drawn about the rule's mean: people
    differ far more from each other than rules do.

    Args:
        results: of a study.
        longest: windows are shown up to where this share of the streams goes on.
    """
    lines = []
    for cells in _alike(results).values():
        curves, ground = [], []
        for cell in cells:
            unmoved = results[replace(cell, start="cold", rule=SOURCE)][0]
            curves += [faded(t.correct) for t in results[cell][0]]
            ground += [faded(t.correct) for t in unmoved]
        end = int(np.quantile([len(c) for c in curves], 1 - longest))
        rule, base = (np.array([c[:end] for c in side if len(c) >= end]) for side in (curves, ground))
        mean = np.nanmean(rule, axis=0)
        half = 1.96 * np.nanstd(rule - base, axis=0) / math.sqrt(max(1, len(rule) - 1))
        of = {"stream": cells[0].stream, "start": cells[0].start, "rule": cells[0].rule}
        lines += [
            of | {"window": t + 1, "accuracy": m, "low": m - h, "high": m + h}
            for t, (m, h) in enumerate(zip(mean, half, strict=True))
        ]
    return pd.DataFrame(lines)


def _alike(results: Results) -> dict[tuple[str, str, str], list[Cell]]:
    """Cells that differ in their seed alone."""
    out: dict[tuple[str, str, str], list[Cell]] = {}
    for cell in results:
        out.setdefault((cell.stream, cell.start, cell.rule), []).append(cell)
    return out


def course_figure(courses: pd.DataFrame) -> Figure:
    """A row of panels for each start, a column for each kind of stream; source and bounds in every panel."""
    kinds, starts = (list(dict.fromkeys(courses[c])) for c in ("stream", "start"))
    names = [n for n in dict.fromkeys(courses["rule"]) if n != SOURCE and n not in BOUNDS]
    looks: dict[str, Any] = {SOURCE: {"color": INK, "linestyle": "--"}}
    looks |= {n: {"color": INK, "linestyle": line, "alpha": 0.5} for n, line in zip(BOUNDS, (":", "-."))}
    for i, name in enumerate(names):
        looks[name] = {"color": PALETTE[i % len(PALETTE)], "linestyle": ("-", "--", ":", "-.")[i // len(PALETTE) % 4]}
    with mpl.rc_context(
        {"text.parse_math": False, "font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
    ):
        figure = Figure(figsize=(2.2 + 3.6 * len(kinds), 0.6 + 2.7 * len(starts)), layout="constrained")
        panels = figure.subplots(len(starts), len(kinds), sharey=True, sharex="col", squeeze=False)
        for (row, begin), (column, kind) in product(enumerate(starts), enumerate(kinds)):
            axes = panels[row, column]
            here = courses[courses["stream"] == kind]
            here = here[(here["start"] == begin) | here["rule"].isin(BOUNDS)]
            for name, part in here.groupby("rule", sort=False):
                axes.plot(part["window"], part["accuracy"], linewidth=1.3, label=name, **looks[str(name)])
                if name in names:
                    band = part["window"], part["low"].clip(lower=0), part["high"].clip(upper=1)
                    axes.fill_between(*band, color=looks[str(name)]["color"], alpha=0.12, linewidth=0)
            axes.set_title(kind if begin == "cold" else f"{kind}, from {begin}", loc="left")
            axes.grid(alpha=0.18)
        figure.supxlabel("windows met", fontsize=9)
        figure.supylabel("fading accuracy, band of the difference to source", fontsize=9)
        handles, labels = panels[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside right upper", frameon=False, fontsize=8)
    return figure


def write(out: Path, study: Study, results: Results, command: str) -> pd.DataFrame:
    """Write ``users.parquet``, ``summary.parquet``, ``course.parquet``, ``personalise.json`` and ``course.png``.

    Returns:
        The summary.
    """
    users, courses = users_frame(results), course(results)
    found = summary(results, users)
    for name, frame in (("users", users), ("summary", found), ("course", courses)):
        buffer = io.BytesIO()
        frame.to_parquet(buffer, index=False)
        write_atomically(out / f"{name}.parquet", buffer.getvalue())
    known = {
        "study": asdict(study),
        "command": command,
        "code": code_digest(),
        "versions": versions(),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "streams": {f"{c.stream}, seed {c.run.seed}": {t.user: t.digest for t in r[0]} for c, r in results.items()},
    }
    text = pd.Series(known | {"summary": found.to_dict(orient="records")}).to_json(indent=1)
    write_atomically(out / "personalise.json", text.encode())
    write_atomically(out / "course.png", png(course_figure(courses)))
    return found

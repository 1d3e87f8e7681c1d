"""Tables of an adaptation study, for the terminal and for Markdown documents."""

from __future__ import annotations

import io
import math
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from rich.console import Group

from fedbn.config import seed_numbers
from fedbn.federation.run import Run
from fedbn.files import DamagedFile, read_json
from fedbn_simulations.adaptation.cells import BOUNDS
from fedbn_simulations.adaptation.metric import StudyMetric
from fedbn_simulations.adaptation.study import Study
from fedbn_simulations.report.documents import replace_block
from fedbn_simulations.report.layout import fitted_table, fold_label
from fedbn_simulations.results.formatting import (
    capitalize,
    format_interval,
    format_number,
    format_signed,
    markdown_table,
    metric_title,
)

MAX_RULE_WIDTH = 26
"""Longer names of rules are folded between their options, in characters."""


def summary_table(found: pd.DataFrame, study: Study, metric: StudyMetric, width: int = 100) -> Group:
    """Rules by kinds of stream: mean of the metric [interval], worst tenth, share of users harmed."""
    seeds = len(seed_numbers(study.seeds))
    users = f"{found['users'].max()} users, {seeds} seed{'s' if seeds > 1 else ''}"
    title = capitalize(metric_title(metric.name))
    kinds = list(dict.fromkeys(found["stream"]))
    lines = []
    for name, by_kind in rows(found):
        mark = "°" if by_kind[kinds[0]]["includes_current"] else ""
        lines.append(
            {"rule": fold_label(name + mark, MAX_RULE_WIDTH)}
            | {kind: _format_line(by_kind[kind], metric.name) for kind in kinds}
        )
    return fitted_table(
        lines,
        width,
        optional=kinds[:0:-1],
        title=f"{title} on unseen users' streams [95 % over users], worst tenth, harmed; {users}",
        caption=f"harmed: share of users {_harm(metric)}. bound-…: oracles with statistics of the whole "
        "stream, or of equally many windows per class. °: statistics include the current window. "
        "*: differs from source, corrected p < .05.",
    )


def _harm(metric: StudyMetric) -> str:
    """When a user counts as harmed."""
    side = "below" if metric.higher_is_better else "above"
    return f"more than {'a point' if metric.is_share else '1 %'} {side} source"


def rows(found: pd.DataFrame) -> list[tuple[str, dict[str, Any]]]:
    """Rows of a table: name (with the strategy if there are several) and one line per stream; oracles last.

    Args:
        found: a `fedbn_simulations.adaptation.results.summary`.
    """
    several = found["strategy"].nunique() > 1
    lines = found.set_index(["strategy", "rule", "stream"], drop=False)
    pairs = dict.fromkeys(zip(found["strategy"], found["rule"], strict=True))
    streams = dict.fromkeys(found["stream"])
    return [
        (f"{strategy}: {rule}" if several else rule, {s: lines.loc[(strategy, rule, s)] for s in streams})
        for strategy, rule in sorted(pairs, key=lambda pair: pair[1] in BOUNDS)
    ]


def _format_line(line: Any, metric: str) -> str:
    star = "*" if line["p_adjusted"] < 0.05 else ""
    mean = f"{format_number(line[metric])}{star} {format_interval(line['low'], line['high'])}".rstrip()
    return f"{mean}\n{format_number(line['worst_decile'])} worst, {line['harmed']:.0%} harmed"


def update_study_document(directory: Path, document: Path) -> None:
    """Write a study's table between ``<!-- begin NAME -->`` and ``<!-- end NAME -->``; NAME is the directory's name.

    Args:
        directory: directory of a finished study.
        document: a Markdown file.

    Raises:
        UserError: the document or its markers are missing, or the study is damaged.
    """
    remedy = "run the same study again; finished cells are used"
    path = directory / "summary.parquet"
    content, study = path.read_bytes(), read_json(directory / "adapt.json", remedy)
    if zlib.crc32(content) != study["files"][path.name]:
        raise DamagedFile(path, ValueError("wrong checksum"), remedy)
    found = pd.read_parquet(io.BytesIO(content))
    sentences = choices(study.get("auto", []), study.get("augmented", {}))
    text = table(found, study.get("metric", "accuracy")) + "".join(f"\n{sentence}\n" for sentence in sentences)
    replace_block(document, directory.resolve().name, text)


def describe(run: Run, study: Study) -> str:
    """Strategy and seed of a run as a prefix, where a study has several."""
    strategy = [run.strategy] if len(study.strategies) > 1 else []
    seed = [f"seed {run.seed}"] if len(seed_numbers(study.seeds)) > 1 else []
    return "".join(f"{part}: " for part in (*strategy, *seed))


def choices(decisions: Sequence[dict[str, Any]], augmented: Mapping[str, str]) -> list[str]:
    """Sentences about what ``auto`` and ``augmented`` are in each run, one each; none without them.

    Args:
        decisions: what ``auto`` chose, with the gains on seen users.
        augmented: augmentation of each run.

    >>> gain = {"rule": "ema", "value": 0.05, "low": 0.01}
    >>> choices([{"seed": 0, "strategy": "fedbn", "chosen": "ema", "gains": [gain]}], {"fedbn, seed 0": "flip"})
    ['`auto` chose `ema` with seed 0 (+.050, lower bound +.010).', '`augmented`: `flip` with fedbn, seed 0.']
    """
    by_rule: dict[str, list[str]] = {}
    for decision in decisions:
        gain = next((g for g in decision["gains"] if g["rule"] == decision["chosen"]), None)
        figures = f" ({format_signed(gain['value'])}, lower bound {format_signed(gain['low'])})" if gain else ""
        by_rule.setdefault(decision["chosen"], []).append(f"{decision['seed']}{figures}")
    parts = [f"`{rule}` with seed{'s' * (len(on) > 1)} {', '.join(on)}" for rule, on in by_rule.items()]
    trained = [f"`{text}` with {run}" for run, text in augmented.items()]
    sentences = {"`auto` chose": parts, "`augmented`:": trained}
    return [f"{begin} {'; '.join(found)}." for begin, found in sentences.items() if found]


def table(found: pd.DataFrame, metric: str) -> str:
    """A Markdown table of a study's summary: three columns per kind of stream; oracles last.

    Differences to the source are positive where a rule is better, whatever the direction of the metric.

    With drift detection there is a fourth column: windows from a change to its alarm, missed changes per stream, and
    false alarms per thousand windows.

    Args:
        found: a `fedbn_simulations.adaptation.results.summary`.
        metric: name of the study's metric.
    """
    users, seeds = found["users"].max(), found["seeds"].max()
    monitored = bool(found["false_alarms_per_1000"].notna().any())
    lines = [_row(name, by_stream, metric, monitored) for name, by_stream in rows(found)]
    head = "" if metric == "accuracy" else f"{capitalize(metric_title(metric))}; differences above 0 are improvements. "
    return f"{head}{users} users, {seeds} seeds.\n\n{markdown_table(lines)}"


def _row(name: str, by_stream: dict[str, Any], metric: str, monitored: bool) -> dict[str, str]:
    row = {"rule": name}
    for stream, line in by_stream.items():
        star = "*" if line["p_adjusted"] < 0.05 else ""
        gain = (
            "" if name.split(": ")[-1] == "source" else f", {format_signed(line['gain'])}{star} {_gain_interval(line)}"
        )
        row[stream] = f"{format_number(line[metric])} {format_interval(line['low'], line['high'])}{gain}".rstrip()
        row[f"worst, {stream}"] = format_number(line["worst"])
        row[f"harmed, {stream}"] = f"{line['harmed']:.0%}"
        if monitored:
            row[f"delay, missed, false, {stream}"] = _alarms(line)
    return row


def _alarms(line: Any) -> str:
    """Delay, missed changes and false alarms per thousand windows; empty without drift detection.

    >>> _alarms({"drift_delay": 12.4, "drift_missed": 0.25, "false_alarms_per_1000": 3.0})
    '12, 0.2, 3.0'
    >>> _alarms({"drift_delay": math.nan, "drift_missed": math.nan, "false_alarms_per_1000": 0.5})
    '–, –, 0.5'
    """
    false = line["false_alarms_per_1000"]
    if math.isnan(false):
        return ""
    delay = "–" if math.isnan(line["drift_delay"]) else f"{line['drift_delay']:.0f}"
    missed = "–" if math.isnan(line["drift_missed"]) else f"{line['drift_missed']:.1f}"
    return f"{delay}, {missed}, {false:.1f}"


def _gain_interval(line: Any) -> str:
    return f"[{format_signed(line['gain_low'])}, {format_signed(line['gain_high'])}]"

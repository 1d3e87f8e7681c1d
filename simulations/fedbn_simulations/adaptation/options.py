"""Options of a study of online adaptation. This module does not import torch, so that the command line starts fast."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass

from fedbn.config import Conditions, option


@dataclass(frozen=True)
class StudyOptions(Conditions):
    """Options of a `fedbn_simulations.adaptation.study.Study`."""

    rules: tuple[str, ...] = option(
        ("pseudo",),
        "Comma-separated rules and test-time methods, e.g. pseudo:n0=64,ema,tent. The source model is always included.",
        panel="Evaluation",
    )
    _: KW_ONLY
    align: tuple[str, ...] = option(
        (),
        "Comma-separated alignments of the input, e.g. rotation. Each is run alone and before each rule on statistics.",
        panel="Evaluation",
    )
    streams: tuple[str, ...] = option(
        ("natural", "iid"), "Comma-separated kinds of stream, e.g. natural,bouts:length=60.", panel="Evaluation"
    )
    starts: tuple[str, ...] = option(
        ("cold",),
        "Comma-separated starts: what a user provides beforehand. cold, recording, classes:k=3.",
        panel="Evaluation",
    )
    strategies: tuple[str, ...] = option(
        ("global-naive",), "Comma-separated strategies of training.", flags=("--strategies", "--strategy")
    )
    seeds: int | tuple[int, ...] = option(2, "Number of seeds. Each trains a model and holds out other users.", low=1)
    metric: str = option(
        "",
        "Metric of tables, intervals and harm, e.g. macro_f1; empty for the one of single windows, such as accuracy or "
        "mae. All are stored.",
        panel="Evaluation",
    )
    tune: bool = option(
        False, "Of rules that differ only in options, keep the best on seen users' later data.", panel="Evaluation"
    )

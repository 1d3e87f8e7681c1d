"""Options of a study of online adaptation. This module does not import torch, so that the command line starts fast."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import Literal

from fedbn.config import Conditions, option

CheckKind = Literal["seen", "held-out"]


@dataclass(frozen=True)
class StudyOptions(Conditions):
    """Options of a `fedbn_simulations.adaptation.study.Study`."""

    rules: tuple[str, ...] = option(
        ("auto",),
        "Comma-separated rules and test-time methods, e.g. auto,pseudo:n0=64,tent. auto is chosen by seen users' later "
        "recordings. The source model is always included.",
        panel="Evaluation",
    )
    _: KW_ONLY
    align: tuple[str, ...] = option(
        (),
        "Comma-separated alignments of the input, e.g. rotation. Each is run alone and before each rule on statistics.",
        panel="Evaluation",
    )
    check: CheckKind = option(
        "seen",
        "Check of candidates for auto on seen users, each left out of the sums. seen: with the network that they "
        "trained. held-out: with one more network per fold of them, trained without it.",
        panel="Evaluation",
    )
    check_rules: bool = option(
        False, "Check the named rules in the same way, and warn of those without a certain gain.", panel="Evaluation"
    )
    augments: tuple[str, ...] = option(
        (),
        "Comma-separated augmentations of training, e.g. rotate:strength=0.3,rotate:strength=0.6. The source model "
        "that is trained with the best of them on seen users' later recordings is one more row, called augmented.",
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

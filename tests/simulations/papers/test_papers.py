"""Papers name claims, protocols and strategies that exist, and their page shows the verdicts of the claims page."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedbn.errors import UserError
from fedbn.protocols.base import Protocol, protocols
from fedbn_simulations.claims import claims
from fedbn_simulations.experiments.experiment import Experiment
from fedbn_simulations.papers import Paper, paper, papers
from fedbn_simulations.papers.page import render, summarize

DOCS = Path(__file__).parents[3] / "docs"


def test_papers_name_what_exists():
    for entry in papers().values():
        assert entry.runs, f"nothing tests {entry.name}"
        assert [run.split()[0] for run in entry.runs] == ["claims"] * bool(entry.claims) + ["compare"] * len(
            entry.comparisons
        )
        if entry.claims:
            claims(entry.claims)
        for protocol, strategies in entry.comparisons:
            Experiment.from_dict({"protocol": protocol, "strategies": strategies.split(",")}).resolved()


def test_unknown_paper_suggests_the_nearest():
    with pytest.raises(UserError, match="fedtan"):
        paper("fedtam")


def test_page_is_up_to_date():
    table = render((DOCS / "claims.md").read_text(encoding="utf-8"))
    page = (DOCS / "papers.md").read_text(encoding="utf-8")
    assert f"<!-- begin papers -->\n{table}<!-- end papers -->" in page


def test_verdict_is_that_of_the_claims():
    entry = Paper("toy", "Somebody 2024", ("claims fedtan-bytes fedtan-messages",), differs="small data")
    ours, verdict = summarize(entry, {"fedtan-bytes": "holds", "fedtan-messages": "does not hold"})
    assert ours.startswith("agrees: [fedtan-bytes]")
    assert verdict == "claims: 1 agrees, 1 does not agree; numbers not comparable (small data)"
    ours, verdict = summarize(Paper("toy", "Somebody 2024", ("compare fixbn fixbn",), differs="no data"), {})
    assert (ours, verdict) == ("not run", "numbers not comparable (no data)")


def test_reproduce_without_data_names_them(run_cli, tmp_path):
    code, _, errors = run_cli("reproduce", "fixbn", "--path", str(tmp_path), "--quick")
    assert code == 2
    assert str(tmp_path) in errors


class Toy(Protocol):
    """A protocol on data that are always there."""

    name = "toy"
    about = source = "toy"
    settings = {"scenario": "digits8:images=600", "rounds": 9, "global_test": 20}  # noqa: RUF012


@pytest.mark.slow
def test_reproduce_runs_a_protocol_and_resumes(run_cli, tmp_path, monkeypatch):
    monkeypatch.setitem(protocols(), "toy", Toy)
    monkeypatch.setitem(papers(), "toy", Paper("toy", "Somebody 2024", ("compare toy fedbn,silobn",)))
    arguments = ("reproduce", "toy", "--quick", "--out", str(tmp_path), "--workers", "1")
    code, output, errors = run_cli(*arguments)
    assert code == 0, errors
    assert "Deviates from protocol toy: rounds (2, not 9)" in " ".join(output.split())
    results = {p: p.stat().st_mtime_ns for p in tmp_path.glob("toy/toy/runs/*/result.json")}
    assert len(results) == 2
    assert run_cli(*arguments)[0] == 0
    assert results == {p: p.stat().st_mtime_ns for p in tmp_path.glob("toy/toy/runs/*/result.json")}

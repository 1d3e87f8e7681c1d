"""Tests of deciding, storing, resuming and writing claims, and of all claim definitions."""

from __future__ import annotations

import importlib
import json
import math
import re
import sys
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from torch import nn

from fedbn.errors import UserError
from fedbn.models.mlp import MLP
from fedbn_simulations.claims import Claim, Effect, claims, page, verdicts
from fedbn_simulations.claims import claim as claim_module
from fedbn_simulations.claims import store as claim_store
from fedbn_simulations.claims.claim import discover_studies
from fedbn_simulations.claims.figures import Verdicted, verdicts_figure
from fedbn_simulations.claims.notes import NEXT, TRIED
from fedbn_simulations.claims.page import write
from fedbn_simulations.claims.store import Cell, Store, cells, run_cells
from fedbn_simulations.claims.studies import common
from fedbn_simulations.claims.verdicts import decide
from tests.helpers import nonempty

NUMERICS = 1
CALLS = []


def toy(arm, seed, quick):
    """A run function with known quantities and effects."""
    CALLS.append((arm, seed))
    return {"score": {"good": 1.0, "bad": 0.5}[arm] + 0.01 * seed * (arm == "good"), "other": float(seed)}


@pytest.fixture
def claim(monkeypatch):
    """A claim of a study in this file."""
    CALLS.clear()
    load, studies = importlib.import_module, "fedbn_simulations.claims.studies."
    here = sys.modules[__name__]
    monkeypatch.setattr(importlib, "import_module", lambda name: here if name.startswith(studies) else load(name))
    monkeypatch.setattr(page, "discover_studies", lambda: {"test_claims": ("Toys", ())})
    return Claim(
        name="toy", sentence="Good beats bad.", source="Somebody 2024", published="none", setting="none", run=toy,
        arms=("good", "bad"), measure="score", effect=lambda v: v["good"] - v["bad"], meaning="good minus bad",
        threshold=0.4,
    )  # fmt: skip


@pytest.fixture
def run(claim, tmp_path):
    """A function that runs the cells of the claim, except the last ``skip`` ones, and returns the store."""

    def run(seeds, quick=False, skip=0):
        store, todo = Store(tmp_path / "cells.jsonl"), cells([claim], seeds, quick)
        run_cells(todo[: len(todo) - skip], store, 1, lambda _: None)
        return store

    return run


# --- statistics


@given(st.lists(st.floats(-100, 100), min_size=2, max_size=12))
def test_effect_interval_matches_scipy(effects):
    effect = Effect.of(effects)
    error = stats.sem(effects)
    assert effect.mean == pytest.approx(sum(effects) / len(effects), abs=1e-9)
    if error > 1e-9:
        low, high = stats.t.interval(0.95, len(effects) - 1, effect.mean, error)
        assert (effect.low, effect.high) == pytest.approx((low, high), rel=1e-6, abs=1e-9)


@given(st.floats(-5, 5), st.floats(0, 3), st.floats(-9, 9))
def test_verdict_requires_whole_interval(mean, half, threshold):
    verdict = Effect(mean, mean - half, mean + half).verdict(threshold)
    assert (verdict == "holds") == (mean - half >= threshold)
    assert (verdict == "does not hold") == (mean + half < threshold)


@pytest.mark.parametrize("effects", [[1.0], [], [1.0, math.nan], [1.0, math.inf]])
def test_effect_rejects_too_few_or_nonfinite_values(effects):
    with pytest.raises(ValueError, match="needs at least two finite effects"):
        Effect.of(effects)


# --- running and storing


def test_cells_are_shared_by_claims_of_one_function(claim):
    other = replace(claim, name="other", arms=("bad",))
    shared = cells([claim, other], 2, quick=False)
    assert [(c.arm, c.seed) for c in shared] == [("good", 0), ("bad", 0), ("good", 1), ("bad", 1)]


def test_run_cells_resumes_to_same_results(claim, tmp_path):
    todo = cells([claim], 3, quick=True)
    full = Store(tmp_path / "full.jsonl")
    run_cells(todo, full, 1, lambda _: None)
    CALLS.clear()
    path = tmp_path / "parts.jsonl"
    run_cells(todo[:3], Store(path), 1, lambda _: None)
    path.write_text(path.read_text() + '{"cell": {"stu')  # killed while writing
    done = []
    resumed = Store(path)
    run_cells(todo, resumed, 1, done.append)
    assert [(c.arm, c.seed) for c in todo] == CALLS
    assert sorted(map(str, done)) == sorted(map(str, todo))
    measured = [{c: line["measured"] for c, line in s.results.items()} for s in (full, resumed, Store(path))]
    assert measured[0] == measured[1] == measured[2]


def test_store_ignores_other_numerics(run, monkeypatch):
    path = run(2, quick=True).path
    assert len(Store(path).results) == 4
    monkeypatch.setattr(claim_store, "NUMERICS", claim_store.NUMERICS + 1)
    assert not Store(path).results


def test_decide_separates_quick_and_full_results(claim, run):
    store = run(2, quick=True)
    assert decide(claim, store, quick=False) is None
    assert decide(claim, store, quick=True).quick


def test_run_cell_rejects_nonfinite_quantity(claim, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "toy", lambda *_: {"score": math.nan})
    with pytest.raises(ValueError, match="score not finite"):
        claim_store.run_cell(Cell("test_claims", "toy", "good", 0, True))


# --- deciding and writing


def test_decide_pairs_by_seed_and_skips_incomplete_seeds(claim, run):
    store = run(4, skip=1)
    entry = decide(claim, store, quick=False)
    assert entry.effects == pytest.approx([0.5, 0.51, 0.52])
    assert entry.verdict == "holds"
    assert decide(replace(claim, threshold=0.9), store, quick=False).verdict == "does not hold"
    assert decide(replace(claim, threshold=0.51), store, quick=False).verdict == "undecided"
    assert decide(replace(claim, measure="other", effect=lambda v: v["good"]), store, quick=False).effects == [0, 1, 2]


def test_decide_needs_two_seeds(claim, run, tmp_path):
    assert decide(claim, run(1), quick=False) is None
    with pytest.raises(UserError, match="no claim has results for two seeds: run claims with --seeds 2 or more"):
        write(tmp_path, [])


def test_write_creates_page_json_and_figure(claim, run, tmp_path):
    path = write(tmp_path / "out", [decide(claim, run(3, quick=True), quick=True)])
    text = path.read_text()
    assert "[toy](claims/test_claims.md#toy) | ✔ holds | 0.51 [" in text
    study = (path.parent / "claims" / "test_claims.md").read_text()
    for words in ("Good beats bad.", "Somebody 2024", "0.51 [", "threshold 0.4", "**holds**"):
        assert words in study, words
    assert "`fedbn claims toy --quick --seeds 3`" in study
    for target in nonempty(re.findall(r"\]\(([^)#]+)\)", text)):
        assert (path.parent / target).stat().st_size > 200
    (entry,) = json.loads((path.parent / "claims" / "claims.json").read_text())["claims"]
    assert entry["effects"] == pytest.approx([0.5, 0.51, 0.52])
    assert entry["low"] < entry["mean"] < entry["high"]
    assert entry["threshold"] == 0.4


def shared_training(arm, seed, quick):
    """A training shared by two arms, and a separate one."""
    CALLS.append((arm, seed))
    return {"score: one": 0.75 + seed, "score: two": 0.25} if arm == "both" else {"score": 0.125}


def test_decide_with_shared_training(claim, tmp_path):
    shared = replace(
        claim, run=shared_training, arms=("one", "two", "three"), effect=lambda v: v["one"] - v["two"] - v["three"],
        trained=lambda arm: arm if arm == "three" else "both",
    )  # fmt: skip
    todo = cells([shared], 2, quick=False)
    assert [c.arm for c in todo] == ["both", "three"] * 2
    store = Store(tmp_path / "cells.jsonl")
    run_cells(todo, store, 1, lambda _: None)
    assert len(CALLS) == 4
    entry = decide(shared, store, quick=False)
    assert entry.values == {"one": [0.75, 1.75], "two": [0.25] * 2, "three": [0.125] * 2}
    assert entry.effects == [0.375, 1.375]
    assert entry.seconds == pytest.approx(sum(line["seconds"] for line in store.results.values()))


def panels(claim, values):
    """Axes of the figure of two claims with the same values."""
    entry = verdicts.Entry(claim, values, [0.5, 0.6], Effect.of([0.5, 0.6]), "holds", 0.1, False, 1.0)
    return page.figure([entry, replace(entry, claim=replace(claim, name="copy"))]).axes


def test_figure_curves_have_one_line_per_series(claim):
    values = {f"{n} {x}": [0.1 * float(x), 0.2] for n in ("BN", "layer norm") for x in ("8", "1", "64")}
    left = panels(replace(claim, drawing="curves", axis="rows", arms=tuple(values)), values)[0]
    assert [line.get_label() for line in left.lines] == ["BN", "layer norm"]
    assert list(left.lines[0].get_xdata()) == [1, 8, 64]
    assert list(left.lines[0].get_ydata()) == pytest.approx([0.15, 0.5, 3.3])
    assert left.get_xlabel() == "rows"
    assert left.get_xscale() == "log"


def test_figure_grid_shows_means_and_gaps(claim):
    values = {"BN @ a": [0.5, 0.7], "BN @ b": [0.1, 0.1], "IN @ b": [0.9, 1.0]}
    left = panels(replace(claim, drawing="grid", arms=tuple(values)), values)[0]
    assert sorted(t.get_text() for t in left.texts) == ["10", "60", "95"]
    assert [t.get_text() for t in left.get_yticklabels()] == ["BN", "IN"]
    assert [t.get_text() for t in left.get_xticklabels()] == ["a", "b"]


def test_figure_draws_shared_values_once(claim):
    values, *effects = panels(claim, {"good": [1.0, 1.1], "bad": [0.5, 0.5]})
    assert values.get_title(loc="left") == "toy"
    assert [a.get_title(loc="left") for a in effects] == ["holds", "copy: holds"]


def test_verdicts_figure_puts_thresholds_at_zero():
    given = [
        ("a", 0.5, 0.4, 0.6, 0.4, "holds"),
        ("b", 1.0, 0.0, 2.0, 1.5, "undecided"),
        ("c", 0.0, 0.0, 0.0, 0.0, "undecided"),
    ]
    (axes,) = verdicts_figure([Verdicted(*values) for values in given]).axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a", "c", "b"]
    bars = [list(line.get_xdata()) for line in axes.lines if len(line.get_xdata()) == 2]
    assert bars[0] == pytest.approx([0, 2])
    assert bars[2] == pytest.approx([-1.5, 0.5])


def test_decide_with_identical_arms_is_undecided(claim, run):
    store = run(3)
    assert decide(replace(claim, effect=lambda v: 0.0, threshold=0.0), store, quick=False).verdict == "undecided"
    assert decide(replace(claim, effect=lambda v: 0.0, threshold=-0.1), store, quick=False).verdict == "holds"


def test_render_lists_tried_unless_claim_holds(claim, run, monkeypatch):
    monkeypatch.setattr(page, "TRIED", {"toy": "other toys"})
    entry = decide(claim, run(3), quick=False)
    assert "- Also tried" not in page.render_study(entry.claim.study, [entry])
    assert "- Also tried: other toys.\n" in page.render_study(
        entry.claim.study, [replace(entry, verdict="does not hold")]
    )
    assert "Generated by `fedbn claims --all --out docs`" in page.render([entry])


def test_render_says_what_would_decide_undecided_claims(claim, run, monkeypatch):
    monkeypatch.setattr(page, "NEXT", {"toy": "more toys"})
    entry = decide(claim, run(3), quick=False)
    assert "## Undecided claims" not in page.render([entry])
    (row,) = [line for line in page.render([replace(entry, verdict="undecided")]).splitlines() if "more toys" in line]
    assert row.split(" | ")[1:4] == ["0.11", "0.031", "2"]


def test_notes_are_about_claims():
    assert set(TRIED) | set(NEXT) <= {c.name for c in claims()}


def test_render_shows_note(claim, run):
    entry = decide(replace(claim, note="tried twice as long, too"), run(2), quick=False)
    assert "- Note: tried twice as long, too.\n" in page.render_study(entry.claim.study, [entry])
    assert "Note" not in page.render_study(claim.study, [replace(entry, claim=claim)])


# --- the claims as stated


def test_claims_are_complete():
    names = [c.name for c in claims()]
    assert len(names) == len(set(names)) > 20
    for c in claims():
        assert c.sentence.endswith(".")
        assert all([c.source, c.published, c.setting, c.meaning, c.measure])
        assert c.arms
        assert math.isfinite(c.effect(dict.fromkeys(c.arms, 0.5)))
        assert all(isinstance(c.trained(arm), str) for arm in c.arms)
        if c.drawing == "curves":
            assert c.axis
            assert all(math.isfinite(float(arm.rpartition(" ")[2])) for arm in c.arms)
        if c.drawing == "grid":
            assert all(arm.count(" @ ") == 1 for arm in c.arms)
        assert c.run.__name__ != "<lambda>"
        assert getattr(sys.modules[c.run.__module__], c.run.__name__) is c.run, "not importable in a worker process"


def test_cli_claims_lists_runs_and_rejects_bad_input(tmp_path, run_cli):
    assert {r["name"] for r in json.loads(run_cli("claims", "--json")[1])} == {c.name for c in claims()}
    code, _, err = run_cli("claims", "bn-sped")
    assert code == 2
    assert "unknown claim or study 'bn-sped'. Did you mean 'bn-speed'?" in err
    assert "give names or --all, not both" in run_cli("claims", "bn-speed", "--all")[2]
    command = ("claims", "bn-speed", "--quick", "--seeds", 2, "--out", "results", "--json")
    code, out, err = run_cli(*command, "--workers", 1)
    assert code == 0, err
    (entry,) = json.loads(out)
    assert entry["name"] == "bn-speed"
    assert len(entry["effects"]) == 2
    assert (tmp_path / "results" / "claims" / "batch_norm.png").exists()
    assert run_cli(*command)[1] == out


def test_claims_of_study():
    assert [c.name for c in claims(["binary"])] == [c.name for c in discover_studies()["binary"][1]]
    with pytest.raises(UserError, match="unknown claim or study"):
        claims(["binari"])
    assert claim_module.__doc__


# --- common code of studies


def test_shuffled_has_full_batches_and_depends_on_seed():
    batches = list(common.shuffled(10, 4, 2, seed=1))
    assert [len(b) for b in batches] == [4, 4, 4, 4]
    assert len(set(torch.cat(batches[:2]).tolist())) == 8
    assert all(torch.equal(a, b) for a, b in zip(batches, common.shuffled(10, 4, 2, seed=1)))
    assert not torch.equal(batches[0], next(iter(common.shuffled(10, 4, 2, seed=2))))


@pytest.mark.parametrize("labels", [1, 3])
def test_single_label_batches_have_few_labels(labels):
    data, _ = common.digits(0)
    all_labels = set()
    for rows in common.single_label(data.y, 32, labels, 40, seed=0):
        batch_labels = set(data.y[rows].tolist())
        assert len(rows) == 32
        assert len(batch_labels) <= labels
        all_labels |= batch_labels
    assert len(all_labels) == 10


def test_digits_split_is_disjoint_and_depends_on_seed():
    data, test = common.digits(0)
    assert (len(data), len(test)) == (1347, 450)
    rows = {r.numpy().tobytes() for r in data.x}
    assert not any(r.numpy().tobytes() in rows for r in test.x)
    assert not torch.equal(common.digits(1)[1].x, test.x)


def test_train_learns_and_stops_on_divergence():
    data, test = common.digits(0)
    steps = []
    with common.seeded(0, "weights"):
        model = MLP((64,), 10)
    order = list(common.shuffled(len(data), 32, 3, 0))
    common.train(model, data, order, torch.optim.SGD(model.parameters(), lr=0.1), on_step=lambda: steps.append(1))
    assert len(steps) == len(order)
    assert common.accuracy(model, test) > 0.85
    steps.clear()
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 99), nn.Linear(99, 10))
    common.train(model, data, order, torch.optim.SGD(model.parameters(), lr=1e30), on_step=lambda: steps.append(1))
    assert len(steps) < 5
    assert 0 <= common.accuracy(model, test) <= 1

"""The ledger: deciding, storing, resuming, writing; and every claim as it is stated."""

from __future__ import annotations

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
from simulations.claims import Claim, Effect, claims, verdicts
from simulations.claims import claim as package
from simulations.claims import page as ledger
from simulations.claims import store as claim_store
from simulations.claims.claim import discover_studies
from simulations.claims.notes import TRIED
from simulations.claims.page import write
from simulations.claims.store import Cell, Store, cells, run_cells
from simulations.claims.studies import common as bench
from simulations.claims.verdicts import decide
from simulations.cli import app as cli

NUMERICS = 1
CALLS = []


def toy(arm, seed, quick):
    """Quantities known in advance, so that effects are too."""
    CALLS.append((arm, seed))
    return {"score": {"good": 1.0, "bad": 0.5}[arm] + 0.01 * seed * (arm == "good"), "other": float(seed)}


@pytest.fixture
def claim(monkeypatch):
    """A claim of a study that is this file."""
    CALLS.clear()
    monkeypatch.setattr(claim_store.importlib, "import_module", lambda _: sys.modules[__name__])
    monkeypatch.setattr(ledger, "discover_studies", lambda: {"test_claims": ("Toys", ())})
    return Claim(
        name="toy", sentence="Good beats bad.", source="nobody", published="none", setting="none", run=toy,
        arms=("good", "bad"), measure="score", effect=lambda v: v["good"] - v["bad"], meaning="good minus bad",
        threshold=0.4,
    )  # fmt: skip


# --- statistics


@given(st.lists(st.floats(-100, 100), min_size=2, max_size=12))
def test_the_interval_is_scipys_t_interval(effects):
    got = Effect.of(effects)
    error = stats.sem(effects)
    assert got.mean == pytest.approx(sum(effects) / len(effects), abs=1e-9)
    if error > 1e-9:
        low, high = stats.t.interval(0.95, len(effects) - 1, got.mean, error)
        assert (got.low, got.high) == pytest.approx((low, high), rel=1e-6, abs=1e-9)


@given(st.floats(-5, 5), st.floats(0, 3), st.floats(-9, 9))
def test_a_verdict_needs_the_whole_interval(mean, half, threshold):
    verdict = Effect(mean, mean - half, mean + half).verdict(threshold)
    assert (verdict == "holds") == (mean - half >= threshold)
    assert (verdict == "does not hold") == (mean + half < threshold)


@pytest.mark.parametrize("effects", [[1.0], [], [1.0, math.nan], [1.0, math.inf]])
def test_no_interval_from_one_seed_or_from_what_is_not_finite(effects):
    with pytest.raises(ValueError, match="needs two finite effects"):
        Effect.of(effects)


# --- running and storing


def test_claims_of_one_function_share_cells(claim):
    other = replace(claim, name="other", arms=("bad",))
    got = cells([claim, other], 2, quick=False)
    assert [(c.arm, c.seed) for c in got] == [("good", 0), ("bad", 0), ("good", 1), ("bad", 1)]


def test_a_run_goes_on_where_it_stopped_to_the_same_numbers(claim, tmp_path):
    todo = cells([claim], 3, quick=True)
    whole = Store(tmp_path / "whole.jsonl")
    run_cells(todo, whole, 1, lambda _: None)
    CALLS.clear()
    path = tmp_path / "parts.jsonl"
    run_cells(todo[:3], Store(path), 1, lambda _: None)
    path.write_text(path.read_text() + '{"cell": {"stu')  # killed while writing
    seen = []
    again = Store(path)
    run_cells(todo, again, 1, seen.append)
    assert [(c.arm, c.seed) for c in todo] == CALLS
    assert sorted(map(str, seen)) == sorted(map(str, todo))
    measured = [{c: line["measured"] for c, line in s.found.items()} for s in (whole, again, Store(path))]
    assert measured[0] == measured[1] == measured[2]


def test_store_ignores_cells_of_other_numerics(claim, tmp_path, monkeypatch):
    path = tmp_path / "cells.jsonl"
    run_cells(cells([claim], 2, quick=True), Store(path), 1, lambda _: None)
    assert len(Store(path).found) == 4
    monkeypatch.setattr(claim_store, "NUMERICS", claim_store.NUMERICS + 1)
    assert not Store(path).found


def test_quick_and_full_results_are_not_mixed(claim, tmp_path):
    store = Store(tmp_path / "cells.jsonl")
    run_cells(cells([claim], 2, quick=True), store, 1, lambda _: None)
    assert decide(claim, store, quick=False) is None
    assert decide(claim, store, quick=True).quick


def test_a_quantity_that_is_not_finite_is_an_error(claim, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "toy", lambda *_: {"score": math.nan})
    with pytest.raises(ValueError, match="score not finite"):
        claim_store.run_cell(Cell("test_claims", "toy", "good", 0, True))


# --- deciding and writing


def test_effects_are_paired_by_seed_and_half_a_seed_does_not_count(claim, tmp_path):
    store = Store(tmp_path / "cells.jsonl")
    run_cells(cells([claim], 4, quick=False)[:-1], store, 1, lambda _: None)
    entry = decide(claim, store, quick=False)
    assert entry.effects == pytest.approx([0.5, 0.51, 0.52])
    assert entry.verdict == "holds"
    assert decide(replace(claim, threshold=0.9), store, quick=False).verdict == "does not hold"
    assert decide(replace(claim, threshold=0.51), store, quick=False).verdict == "undecided"
    assert decide(replace(claim, measure="other", effect=lambda v: v["good"]), store, quick=False).effects == [0, 1, 2]


def test_one_seed_is_no_entry(claim, tmp_path):
    store = Store(tmp_path / "cells.jsonl")
    run_cells(cells([claim], 1, quick=False), store, 1, lambda _: None)
    assert decide(claim, store, quick=False) is None
    with pytest.raises(UserError, match="no claim has two seeds yet: run some, with --seeds 2 or more"):
        write(tmp_path, [])


def test_ledger_page_and_figure(claim, tmp_path):
    store = Store(tmp_path / "cells.jsonl")
    run_cells(cells([claim], 3, quick=True), store, 1, lambda _: None)
    page = write(tmp_path / "out", [decide(claim, store, quick=True)])
    text = page.read_text()
    for words in (
        "Good beats bad.",
        "nobody",
        "0.51 [",
        "threshold 0.4",
        "`fedbn claims toy --quick --seeds 3`",
        "**holds**",
    ):
        assert words in text, words
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        assert (page.parent / target).stat().st_size > 1000
    (found,) = json.loads((page.parent / "claims" / "ledger.json").read_text())["claims"]
    assert found["effects"] == pytest.approx([0.5, 0.51, 0.52])
    assert found["low"] < found["mean"] < found["high"]
    assert found["threshold"] == 0.4


def several(arm, seed, quick):
    """One training that two arms read, and one of its own."""
    CALLS.append((arm, seed))
    return {"score: one": 0.75 + seed, "score: two": 0.25} if arm == "both" else {"score": 0.125}


def test_arms_that_read_one_training_share_its_cell(claim, tmp_path):
    shared = replace(
        claim, run=several, arms=("one", "two", "three"), effect=lambda v: v["one"] - v["two"] - v["three"],
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
    assert entry.seconds == pytest.approx(sum(line["seconds"] for line in store.found.values()))


def panels(claim, values):
    """Texts of the left panel of a claim's figure."""
    entry = verdicts.Entry(claim, values, [0.5, 0.6], Effect.of([0.5, 0.6]), "holds", False, 1.0)
    return ledger.figure([entry, replace(entry, claim=replace(claim, name="again"))]).axes


def test_curves_are_drawn_over_their_numbers_one_line_a_series(claim):
    values = {f"{n} {x}": [0.1 * float(x), 0.2] for n in ("BN", "layer norm") for x in ("8", "1", "64")}
    left = panels(replace(claim, drawing="curves", axis="rows", arms=tuple(values)), values)[0]
    assert [line.get_label() for line in left.lines] == ["BN", "layer norm"]
    assert list(left.lines[0].get_xdata()) == [1, 8, 64]
    assert list(left.lines[0].get_ydata()) == pytest.approx([0.15, 0.5, 3.3])
    assert left.get_xlabel() == "rows"
    assert left.get_xscale() == "log"


def test_a_grid_shows_means_and_leaves_gaps(claim):
    values = {"BN @ a": [0.5, 0.7], "BN @ b": [0.1, 0.1], "IN @ b": [0.9, 1.0]}
    left = panels(replace(claim, drawing="grid", arms=tuple(values)), values)[0]
    assert sorted(t.get_text() for t in left.texts) == ["10", "60", "95"]
    assert [t.get_text() for t in left.get_yticklabels()] == ["BN", "IN"]
    assert [t.get_text() for t in left.get_xticklabels()] == ["a", "b"]


def test_what_two_claims_read_is_drawn_once(claim):
    axes = panels(claim, {"good": [1.0, 1.1], "bad": [0.5, 0.5]})
    assert [a.get_title(loc="left") for a in axes[::2]] == ["toy", "again"]
    assert axes[2].texts[0].get_text() == "score: drawn above, toy"
    assert not axes[2].axison


def test_arms_that_never_differ_do_not_beat_each_other(claim, tmp_path):
    store = Store(tmp_path / "cells.jsonl")
    run_cells(cells([claim], 3, quick=False), store, 1, lambda _: None)
    assert decide(replace(claim, effect=lambda v: 0.0, threshold=0.0), store, quick=False).verdict == "undecided"
    assert decide(replace(claim, effect=lambda v: 0.0, threshold=-0.1), store, quick=False).verdict == "holds"


def test_what_was_tried_stands_where_a_claim_does_not_hold(claim, tmp_path, monkeypatch):
    monkeypatch.setattr(ledger, "TRIED", {"toy": "other toys"})
    store = Store(tmp_path / "cells.jsonl")
    run_cells(cells([claim], 3, quick=False), store, 1, lambda _: None)
    entry = decide(claim, store, quick=False)
    assert "- Tried" not in ledger.markdown([entry])
    assert "- Tried: other toys.\n" in ledger.markdown([replace(entry, verdict="does not hold")])
    assert "Written by `fedbn claims --all --out docs`" in ledger.markdown([entry])


def test_everything_tried_is_of_a_claim():
    assert set(TRIED) <= {c.name for c in claims()}


def test_a_note_is_on_the_page(claim, tmp_path):
    store = Store(tmp_path / "cells.jsonl")
    run_cells(cells([claim], 2, quick=False), store, 1, lambda _: None)
    entry = decide(replace(claim, note="tried twice as long, too"), store, quick=False)
    assert "- Note: tried twice as long, too.\n" in ledger.markdown([entry])
    assert "Note" not in ledger.markdown([replace(entry, claim=claim)])


# --- the claims as stated


def test_every_claim_is_complete_and_its_effect_is_a_number():
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
        assert getattr(sys.modules[c.run.__module__], c.run.__name__) is c.run, "a worker process could not find it"


def test_the_command_line_lists_runs_and_refuses(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["fedbn", "claims", *arguments])
        try:
            cli.main()
        except SystemExit as stop:
            return stop.code or 0, *capsys.readouterr()
        return 0, *capsys.readouterr()

    assert {r["name"] for r in json.loads(call("--json")[1])} == {c.name for c in claims()}
    code, _, err = call("bn-sped")
    assert code == 2
    assert "unknown claim or study 'bn-sped'. Did you mean 'bn-speed'?" in " ".join(err.split())
    code, _, err = call("bn-speed", "--all")
    assert "give names or --all, not both" in err
    code, out, err = call("bn-speed", "--quick", "--seeds", "2", "--out", "there", "--workers", "1", "--json")
    assert code == 0, err
    (found,) = json.loads(out)
    assert found["name"] == "bn-speed"
    assert len(found["effects"]) == 2
    assert (tmp_path / "there" / "claims" / "batch_norm.png").exists()
    assert call("bn-speed", "--quick", "--seeds", "2", "--out", "there", "--json")[1] == out


def test_a_study_names_all_its_claims():
    assert [c.name for c in claims(["binary"])] == [c.name for c in discover_studies()["binary"][1]]
    with pytest.raises(UserError, match="unknown claim or study"):
        claims(["binari"])
    assert package.__doc__


# --- what studies share


def test_batches_are_of_one_size_and_the_seeds():
    got = list(bench.shuffled(10, 4, 2, seed=1))
    assert [len(b) for b in got] == [4, 4, 4, 4]
    assert len(set(torch.cat(got[:2]).tolist())) == 8
    assert all(torch.equal(a, b) for a, b in zip(got, bench.shuffled(10, 4, 2, seed=1)))
    assert not torch.equal(got[0], next(iter(bench.shuffled(10, 4, 2, seed=2))))


@pytest.mark.parametrize("labels", [1, 3])
def test_badly_built_batches_hold_few_labels(labels):
    data, _ = bench.digits(0)
    seen = set()
    for rows in bench.single_label(data.y, 32, labels, 40, seed=0):
        found = set(data.y[rows].tolist())
        assert len(rows) == 32
        assert len(found) <= labels
        seen |= found
    assert len(seen) == 10


def test_training_and_test_images_are_apart_and_the_seeds():
    data, test = bench.digits(0)
    assert (len(data), len(test)) == (1347, 450)
    rows = {r.numpy().tobytes() for r in data.x}
    assert not any(r.numpy().tobytes() in rows for r in test.x)
    assert not torch.equal(bench.digits(1)[1].x, test.x)


def test_a_diverging_run_ends_and_one_that_learns_learns():
    data, test = bench.digits(0)
    steps = []
    with bench.seeded(0, "weights"):
        model = MLP((64,), 10)
    order = list(bench.shuffled(len(data), 32, 3, 0))
    bench.train(model, data, order, torch.optim.SGD(model.parameters(), lr=0.1), on_step=lambda: steps.append(1))
    assert len(steps) == len(order)
    assert bench.accuracy(model, test) > 0.85
    steps.clear()
    bare = nn.Sequential(nn.Flatten(), nn.Linear(64, 99), nn.Linear(99, 10))
    bench.train(bare, data, order, torch.optim.SGD(bare.parameters(), lr=1e30), on_step=lambda: steps.append(1))
    assert len(steps) < 5
    assert 0 <= bench.accuracy(bare, test) <= 1

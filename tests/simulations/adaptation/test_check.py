"""The federation's own check of candidates, and the rows of a study that it chooses."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import fedbn
from fedbn.federation.run import Run
from fedbn.online.traces import ClassTrace
from fedbn.plugins import render
from fedbn.streams import stream
from fedbn.tasks import parse_task
from fedbn_simulations.adaptation.cells import SOURCE, read_cell
from fedbn_simulations.adaptation.check import (
    AUGMENTED,
    AUTO,
    RECORDED,
    WORN,
    Decision,
    candidates,
    check_streams,
    choose_augmented,
    decide,
    fold_populations,
    fold_sources,
    lower_bound,
    warnings,
)
from fedbn_simulations.adaptation.methods import adaptation_method
from fedbn_simulations.adaptation.metric import StudyMetric
from fedbn_simulations.adaptation.source_model import untrained_source_model
from fedbn_simulations.adaptation.study import Study, run_study
from fedbn_simulations.cli.app import app
from fedbn_simulations.results.formatting import format_signed

METRIC = StudyMetric.of(parse_task("classification"))
POPULATION = "population:diversity=1.0"


def worn(users=8, unseen=1, triples=((0, 1, 2), (3, 4, 5))):
    """A population of worn sensors, with two activities of different gravity."""
    draw = torch.Generator().manual_seed(0)
    y = torch.arange(24).repeat(users) // 6 % 2
    x = 0.2 * torch.randn(len(y), 6, 16, generator=draw)
    x[:, :3] += torch.eye(3)[y][:, :, None]
    names = np.repeat([f"u{i}" for i in range(users)], 24)
    found = fedbn.Population.from_arrays(x.numpy(), y.numpy(), user=names, unseen=unseen)
    return replace(found, triples=triples)


def source_of(population, **values):
    text = fedbn.scenarios.base.scenario_text(population)
    return untrained_source_model(Run(text, "global-naive", model="har-cnn", **values).resolved())


@pytest.fixture(scope="module")
def source():
    return source_of(worn())


def refuse(run):
    raise AssertionError("trained")


def follow_with(accuracy):
    """Traces of 100 windows, with the accuracy of each rule (and stream) in hundredths: a number, or one per user."""

    def follow(cell, model):
        y = np.zeros(100, int)
        names = [u.name for u in model.users(cell.users)]
        values = accuracy.get((cell.rule, cell.stream), accuracy.get(cell.rule, 40))
        right = [values[name] if isinstance(values, dict) else values for name in names]
        traces = [
            ClassTrace(n, "d", y, (np.arange(100) >= r).astype(int), y * 0.5, y * 1.0, y * 1.0)
            for n, r in zip(names, right)
        ]
        return traces, {}

    return follow


def test_candidates_are_alignments_rule_and_combinations_that_fit(source):
    rules = ("", POPULATION, "matched", f"{POPULATION}+matched")
    aligned = [f"{'+'.join(filter(None, (align, rule)))}/fallback" for align in ("gain", "rotation") for rule in rules]
    assert set(candidates(source)) == {*rules[1:], *aligned}
    assert "rotation/fallback" not in candidates(source_of(worn(triples=())))
    for text in candidates(source):
        assert adaptation_method(text).text == text


def test_folds_leave_each_seen_user_out_once_and_of_all_sums(source):
    populations = fold_populations(source.ctx.population)
    left_out = [p.users[i].name for p in populations for i in p.unseen]
    assert left_out == [source.ctx.population.users[i].name for i in source.ctx.population.seen]
    assert [len(p.unseen) for p in populations] == [3, 2, 2][: len(populations)] == [3, 2, 2]
    rule, align = (adaptation_method(text) for text in (POPULATION, "rotation"))
    for _, _, model in fold_sources(source, "seen", refuse):
        population = model.ctx.population
        users = list(population.users)
        for i in population.unseen:
            users[i] = replace(users[i], train=replace(users[i].train, x=users[i].train.x * 1.5 + 0.1))
        changed = replace(model, ctx=replace(model.ctx, population=replace(population, users=tuple(users))))
        for path, prior in model.prior_for(rule.rule).items():
            assert torch.equal(prior.mean, changed.prior_for(rule.rule)[path].mean)
        assert torch.equal(model.sums_for(align)[0].prior.mean, changed.sums_for(align)[0].prior.mean)
        seen = population.seen[0]
        users[seen] = replace(users[seen], train=replace(users[seen].train, x=users[seen].train.x + 0.1))
        changed = replace(model, ctx=replace(model.ctx, population=replace(population, users=tuple(users))))
        assert not torch.equal(model.sums_for(align)[0].prior.mean, changed.sums_for(align)[0].prior.mean)


def test_held_out_check_trains_without_each_fold(source):
    runs = []
    for _, fold, model in fold_sources(source, "held-out", lambda run: runs.append(run) or untrained_source_model(run)):
        assert fold == ""
        assert len(model.users("seen")) + len(model.users("unseen")) == 7
    assert len({run.id for run in runs}) == 3
    again = [run for run, _, _ in fold_sources(source, "held-out", untrained_source_model)]
    assert [run.id for run in again] == [run.id for run in runs]


def test_decide_chooses_the_largest_lower_bound(source):
    names = [source.ctx.population.users[i].name for i in source.ctx.population.seen]
    uneven = dict(zip(names, [50, 50, 50, 50, 50, 50, 99]))
    accuracy = {SOURCE: 50, POPULATION: uneven, "rotation/fallback": 55, f"rotation+{POPULATION}/fallback": 40}
    found = decide(source, "seen", METRIC, follow_with(accuracy), refuse)
    assert found.chosen == "rotation/fallback"
    assert found.reason == (
        "auto uses rotation/fallback, with the largest lower bound of 11 candidates: +.050 (lower bound +.050) on "
        "later recordings, as recorded and turned, of 7 seen users."
    )
    gains = {g.rule: (g.value, g.harmed) for g in found.gains}
    assert gains[POPULATION] == pytest.approx((0.07, 0))
    assert gains["rotation/fallback"] == pytest.approx((0.05, 0))
    assert gains[f"rotation+{POPULATION}/fallback"] == pytest.approx((-0.1, 1))
    assert (found.users, found.windows, found.trainings) == (7, 2 * 12 * 7 * 100, 0)
    assert found.bytes_per_user > 0
    assert json.loads(json.dumps(found.as_dict()))["chosen"] == found.chosen


@pytest.mark.slow
def test_decide_stays_with_the_source_without_a_sure_gain(source):
    names = [source.ctx.population.users[i].name for i in source.ctx.population.seen]
    uneven = dict(zip(names, [50, 50, 50, 50, 50, 45, 99]))
    accuracy = {SOURCE: 50, POPULATION: uneven, "rotation/fallback": 45, f"rotation+{POPULATION}/fallback": 40}
    found = decide(source, "seen", METRIC, follow_with(accuracy | {"ema": 99}), refuse, named=("ema",))
    assert found.chosen == SOURCE
    best, _ = next((g.value, g.low) for g in found.gains if g.rule == POPULATION)
    assert best == pytest.approx(0.44 / 7)
    assert found.reason.startswith(
        f"auto uses the source: no gain of 11 candidates is certain; best {POPULATION}, +.063 "
    )
    assert warnings(found, ("ema", "rotation", "source", "tent")) == [
        "rotation is not supported by the federation's own check: −.050 (lower bound −.050) on later recordings, "
        "as recorded and turned, of 7 seen users, 100% harmed"
    ]
    few = decide(source_of(worn(users=4)), "seen", METRIC, refuse, refuse)
    assert few == Decision(SOURCE, "auto uses the source: 3 seen users are too few for a check.", (), 3)


@pytest.mark.slow
@pytest.mark.parametrize(("recorded", "turned", "chosen"), [(49, 60, True), (47, 99, False), (51, 45, False)])
def test_decide_needs_a_mean_gain_and_no_loss_as_recorded(source, recorded, turned, chosen):
    rule = "rotation/fallback"
    accuracy = {SOURCE: 50, (rule, RECORDED): recorded, (rule, WORN): turned}
    found = decide(source, "seen", METRIC, follow_with(accuracy), refuse)
    assert found.chosen == (rule if chosen else SOURCE)
    [gain] = [g for g in found.gains if g.rule == rule]
    assert (gain.value, gain.recorded) == pytest.approx(((recorded + turned) / 200 - 0.5, recorded / 100 - 0.5))
    assert gain.margin == pytest.approx(0.02)
    figure = format_signed(gain.recorded)
    assert found.reason.endswith(f"{figure} ({figure}) as recorded.") or not chosen


def test_check_turns_sensors_with_axes_only(source):
    assert check_streams(source) == (RECORDED, WORN)
    assert check_streams(source_of(worn(triples=()))) == (RECORDED,)
    assert render(stream(WORN)) == WORN


def test_lower_bound_covers_the_mean_about_as_often_as_it_says():
    draw = np.random.default_rng(0)
    below = np.mean([lower_bound(draw.normal(size=25), 0.9) <= 0 for _ in range(60)])
    assert 0.8 < below < 0.99
    assert lower_bound(np.array([0.0, 0.2]), 0.95) == 0


def test_choose_augmented_takes_the_best_on_seen_users(source):
    texts = ("jitter:scale=0.1", "rotate:strength=0.5", "rotate")
    values = dict(zip(texts, (0, 1, 1)))

    def follow(cell, model):
        assert (cell.users, cell.stream, cell.rule) == ("seen", "natural", SOURCE)
        return follow_with({SOURCE: 50 + values[cell.run.plan.augment]})(cell, source)

    found = choose_augmented(source, texts, METRIC, lambda run: source, follow)
    assert found == replace(source.run, plan=replace(source.run.plan, augment=texts[1]))


@pytest.mark.slow
def test_study_of_auto_writes_choice_and_warns(tmp_path):
    given = {"scenario": "digits8:users=8", "rules": ("auto", POPULATION), "streams": ("natural",), "seeds": 1}
    given |= {"rounds": 1, "augments": ("jitter:scale=0.1", "jitter:scale=0.5"), "check_rules": True}
    study, results, decisions = run_study(Study.from_dict(given), tmp_path)
    assert study.rules == (SOURCE, AUTO, POPULATION, AUGMENTED)
    [decision] = decisions.values()
    [(cell, traces)] = [(cell, traces) for cell, (traces, _) in results.items() if cell.rule == AUTO]
    others, _ = read_cell(tmp_path, replace(cell, rule=decision.chosen))
    for one, other in zip(traces, others, strict=True):
        assert one.predicted.tolist() == other.predicted.tolist()
    [facts] = [facts for cell, (_, facts) in results.items() if cell.rule == AUGMENTED]
    assert facts["augment"] in given["augments"]
    command = ["adapt", given["scenario"], "--rules", f"auto,{POPULATION}", "--streams", "natural", "--seeds", "1"]
    command += ["--rounds", "1", "--augments", ",".join(given["augments"]), "--check-rules", "--out", str(tmp_path)]
    shown = CliRunner().invoke(app, command, catch_exceptions=False).stdout
    assert decision.reason in " ".join(shown.split())
    [gain] = [g for g in decision.gains if g.rule == POPULATION]
    assert ("is not supported by the federation's own check" in " ".join(shown.split())) is not gain.supported
    stored = json.loads((tmp_path / "adapt.json").read_text())
    assert stored["auto"][0]["reason"] == decision.reason
    assert list(stored["augmented"].values()) == [facts["augment"]]


def test_auto_is_the_default_and_is_not_repeated():
    study = Study.from_dict({"scenario": "hapt", "align": ("rotation",)}).resolved()
    assert study.rules == (SOURCE, AUTO, "rotation")
    assert study.resolved() == study

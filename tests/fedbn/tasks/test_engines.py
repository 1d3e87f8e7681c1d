"""Every task with every optimizer: engines agree bit by bit, stacked clients up to rounding."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedbn.federation.setup import build_context
from fedbn.optim.base import optimizers
from fedbn.stacked.executors import STACKED, ClientExecutor
from fedbn.tasks import tasks
from fedbn_simulations.engines.execute import execute
from tests.fedbn.stacked.test_executors import in_double_precision, max_differences, run_n_rounds
from tests.fedbn.tasks.populations import MODELS
from tests.fedbn.tasks.stacked_table import table, task_run
from tests.helpers import assert_engines_agree

FAST = {("classification", "adamw"), ("segmentation", "adam")}

CASES = [
    pytest.param(task, name, marks=[] if (task, name) in FAST else pytest.mark.slow)
    for task in MODELS
    for name in optimizers()
]


def test_every_task_is_tested():
    assert {name for name, cls in tasks().items() if cls.__module__.startswith("fedbn.")} == set(MODELS)


@pytest.mark.parametrize(("task", "optimizer"), CASES)
def test_task_with_optimizer_agrees_on_every_engine(task, optimizer):
    run = task_run(task, optimizer, optimizer_state="keep")
    exact = assert_engines_agree(run)
    stacked = execute(run, "grid:stacked")
    assert stacked.execution == {"train": [STACKED], "evaluate": [STACKED]}
    # Adaptive steps enlarge the rounding of zero gradients (a bias before BN), which changes scores in float32.
    losses = [point.train_loss for point in exact.curve]
    assert [point.train_loss for point in stacked.curve] == pytest.approx(losses, rel=1e-3)
    ctx = in_double_precision(build_context(run))
    results = [run_n_rounds(ctx, ClientExecutor(executor, 1), None, 2) for executor in ("one", "stacked")]
    assert max(max_differences(*results)) < 1e-6


@pytest.mark.slow
def test_documented_table_matches_the_programs():
    text = (Path(__file__).parents[3] / "docs" / "speed.md").read_text(encoding="utf-8")
    block = text.partition("<!-- begin stacked-tasks -->\n")[2].partition("<!-- end stacked-tasks -->")[0]
    assert block == table(), "run: python -m tests.fedbn.tasks.stacked_table"

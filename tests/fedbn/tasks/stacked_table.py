"""What trains stacked, as Markdown: ``python -m tests.fedbn.tasks.stacked_table``.

Programs are built for each task and optimizer, and for each strategy and personalization method, as an engine does.
"""

from __future__ import annotations

from textwrap import fill

from fedbn.federation.run import Run, plan_for
from fedbn.federation.setup import build_context
from fedbn.optim.base import optimizers
from fedbn.personalization.base import personalizations
from fedbn.stacked.cohort import Cohort
from fedbn.stacked.layers import Unstackable
from fedbn.strategies.base import Progress, strategies
from fedbn.tasks import tasks
from fedbn_simulations.results.formatting import markdown_table
from tests.fedbn.tasks import populations

OTHER = "torch.optim:Adagrad"
"""An optimizer without a stacked step."""


def task_run(task, optimizer, **plan):
    """A small run of a task."""
    scenario, model = f"{populations.__name__}:{task}", populations.MODELS[task]
    chosen = {"rounds": 2, "batch_size": 8, "eval_every": 1, "global_test": 12, "lr": 0.01, "weight_decay": 0.0, **plan}
    return Run(
        scenario, "fedbn", model=model, task=task, plan=plan_for("digits8", optimizer=optimizer, **chosen)
    ).resolved()


def how(run):
    """``stacked``, or the reason why the clients of a run train one by one."""
    ctx = build_context(run)
    try:
        Cohort(ctx).program(Progress(1, 2), ({},) if ctx.strategy.syncs_first_batch else ())
    except Unstackable as reason:
        return str(reason)
    return "stacked"


def table():
    """A table of tasks and optimizers, and the strategies and methods that train one by one."""
    names = [*optimizers(), OTHER]
    cells = {
        task: {name: how(task_run(task, name)) for name in names}
        for task in sorted(tasks())
        if task in populations.MODELS
    }
    reasons = {reason: f"one by one [{i}]" for i, reason in enumerate(_reasons(cells), 1)}
    rows = [
        {"task": task, **{name: reasons.get(cell, cell) for name, cell in row.items()}} for task, row in cells.items()
    ]
    lines = [f"[{i}] {reason}." for i, reason in enumerate(_reasons(cells), 1)]
    kinds = {
        "Strategies": {name: name for name in strategies()},
        "Personalization methods": {name: f"global-naive+{name}" for name in personalizations()},
    }
    parts = [markdown_table(rows), *lines, ""]
    for kind, treatments in kinds.items():
        by_reason = {}
        for name, treatment in treatments.items():
            run = Run("digits8", treatment, model="small-cnn", plan=plan_for("digits8", rounds=2)).resolved()
            by_reason.setdefault(how(run), []).append(f"`{name}`")
        count = len(by_reason.pop("stacked", ()))
        text = "; ".join(f"{', '.join(names)} ({reason})" for reason, names in sorted(by_reason.items()))
        parts.append(
            fill(
                f"{kind}: {count} of {len(treatments)} train stacked. One by one: {text}.", 125, break_on_hyphens=False
            )
        )
        parts.append("")
    return "\n".join(parts).rstrip() + "\n"


def _reasons(cells):
    return dict.fromkeys(cell for row in cells.values() for cell in row.values() if cell != "stacked")


if __name__ == "__main__":
    print(table(), end="")

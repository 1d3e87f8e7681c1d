"""Progress bar over all rounds of all runs, with the remaining time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from fedbn_simulations.experiments.tasks import Event, Task
from fedbn_simulations.results.labels import readable


class Observer(Protocol):
    """Receives the progress of a comparison."""

    def started(self, title: str, tasks: Sequence[Task]) -> None:
        """Called when a batch of tasks starts."""

    def report(self, event: Event) -> None:
        """Called when a round or a run is done."""


class Observers:
    """Several observers as one."""

    def __init__(self, *observers: Observer) -> None:
        self.observers = observers

    def started(self, title: str, tasks: Sequence[Task]) -> None:
        """Call `started` of every observer."""
        for observer in self.observers:
            observer.started(title, tasks)

    def report(self, event: Event) -> None:
        """Call `report` of every observer."""
        for observer in self.observers:
            observer.report(event)


class ProgressBar:
    """Shows the progress of a comparison; without a terminal, it only prints a line per finished run."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("rounds"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self.total = self.progress.add_task("loading data and models", total=None)
        self.tasks: dict[str, Task] = {}
        self.done: dict[str, int] = {}
        self.ended = 0

    def __enter__(self) -> ProgressBar:
        self.progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.progress.stop()

    def started(self, title: str, tasks: Sequence[Task]) -> None:
        """Start a new bar for a batch of tasks."""
        self.tasks = {t.directory: t for t in tasks}
        self.done = dict.fromkeys(self.tasks, 0)
        self.ended = 0
        self.progress.remove_task(self.total)
        self.total = self.progress.add_task(f"{title} {len(tasks)} runs", total=sum(t.run.plan.rounds for t in tasks))

    def report(self, event: Event) -> None:
        """Advance the bar, and print a line if a run is finished."""
        self.done[event.directory] = event.round
        self.progress.update(self.total, completed=sum(self.done.values()))
        if event.ended:
            self.ended += 1
            run = self.tasks[event.directory].run
            line = f"{self.ended:3d}/{len(self.tasks)}  {readable(run.strategy)}, seed {run.seed}"
            if run.validation:
                line += f", lr {run.plan.lr:g} (validation)"
            self.console.print(line, highlight=False)

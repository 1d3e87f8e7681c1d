"""Progress bars: one over all rounds of all runs, with the time left."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from simulations.experiments.tasks import Event, Task


class Watcher(Protocol):
    """Whoever wants to know how a comparison goes."""

    def started(self, title: str, tasks: Sequence[Task]) -> None:
        """A batch of tasks begins."""

    def report(self, event: Event) -> None:
        """A round or a run is done."""


class Watchers:
    """Several watchers as one."""

    def __init__(self, *watchers: Watcher) -> None:
        self.watchers = watchers

    def started(self, title: str, tasks: Sequence[Task]) -> None:
        """A batch of tasks begins."""
        for watcher in self.watchers:
            watcher.started(title, tasks)

    def report(self, event: Event) -> None:
        """A round or a run is done."""
        for watcher in self.watchers:
            watcher.report(event)


class Bars:
    """Shows events of a comparison; silent on a console that is no terminal, except for a line a finished run."""

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

    def __enter__(self) -> Bars:
        self.progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.progress.stop()

    def started(self, title: str, tasks: Sequence[Task]) -> None:
        """A batch of tasks begins."""
        self.tasks = {t.directory: t for t in tasks}
        self.done = dict.fromkeys(self.tasks, 0)
        self.ended = 0
        self.progress.remove_task(self.total)
        self.total = self.progress.add_task(f"{title} {len(tasks)} runs", total=sum(t.run.plan.rounds for t in tasks))

    def report(self, event: Event) -> None:
        """A round or a run is done."""
        self.done[event.directory] = event.round
        self.progress.update(self.total, completed=sum(self.done.values()))
        if event.ended:
            self.ended += 1
            run = self.tasks[event.directory].run
            line = f"{self.ended:3d}/{len(self.tasks)}  {run.strategy}, seed {run.seed}"
            if run.validation:
                line += f", lr {run.plan.lr:g} (validation)"
            self.console.print(line, highlight=False)

"""Rounds of several simulators, each in a process of its own, so that they can alternate and see the same load.

A process runs one round for each line on its standard input, and answers with seconds and bytes.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, Self

from fedbn.federation.context import RunContext
from fedbn.federation.run import Run
from fedbn.federation.setup import build_context


class ProcessEnded(RuntimeError):
    """A simulator cannot run a workload; the message is the last line of its error."""


@dataclass
class RoundProcess:
    """A simulator of a run as a context manager: ``python -m MODULE RUN THREADS [OPTION ...]``.

    Attributes:
        module: module of the process; its main program calls `Meter` or `serve`.
        run: the run to train.
        threads: number of threads.
        options: further arguments.
        python: interpreter of the process.
        wall, cpu: seconds of each round so far.
        memory: growth of the peak memory since the data were loaded, in bytes.
    """

    module: str
    run: Run
    threads: int
    options: Sequence[str] = ()
    python: str = sys.executable
    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    memory: int = 0

    def __enter__(self) -> Self:
        """Start the process."""
        command = [self.python, "-m", self.module, self.run.to_json(), str(self.threads), *self.options]
        self._errors = tempfile.TemporaryFile("w+")
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=self._errors, text=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop the process."""
        assert self._process.stdin
        assert self._process.stdout
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait()
        self._errors.close()

    def round(self) -> None:
        """Run one round.

        Raises:
            ProcessEnded: the process has ended.
        """
        assert self._process.stdin
        assert self._process.stdout
        line = ""
        with suppress(BrokenPipeError):
            self._process.stdin.write("\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            self._errors.seek(0)
            lines = [line for line in self._errors.read().splitlines() if line.strip()]
            raise ProcessEnded(lines[-1].split("Error: ", 1)[-1] if lines else f"{self.module} ended")
        wall, cpu, self.memory = json.loads(line)
        self.wall.append(wall)
        self.cpu.append(cpu)


class Meter:
    """The other side of a `RoundProcess`, to be created once the data are loaded; prints go to standard error."""

    def __init__(self, cpu: Callable[[], float] = time.process_time) -> None:
        """Measure rounds with a clock of CPU seconds."""
        self._cpu, self._memory, self._before = cpu, peak_memory(), (0.0, 0.0)
        self._replies = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)

    def wait(self) -> None:
        """Wait for the next line and start the clocks. Exits at the end of the input."""
        if not sys.stdin.readline():
            sys.exit()
        self._before = time.perf_counter(), self._cpu()

    def reply(self) -> None:
        """Answer with the seconds since `wait`."""
        wall, cpu = time.perf_counter() - self._before[0], self._cpu() - self._before[1]
        print(json.dumps([wall, cpu, peak_memory() - self._memory]), file=self._replies, flush=True)


def serve(step: Callable[[], Any]) -> NoReturn:
    """Call ``step`` for each line on standard input."""
    meter = Meter()
    while True:
        meter.wait()
        step()
        meter.reply()


def context_from_arguments() -> tuple[RunContext, int]:
    """The context of the run and the number of threads in the arguments of this process."""
    return build_context(Run.from_dict(json.loads(sys.argv[1]))), int(sys.argv[2])


def peak_memory() -> int:
    """Peak memory of this process in bytes.

    On Linux, ``ru_maxrss`` includes the memory of the parent process; ``VmHWM`` does not.
    """
    status = Path("/proc/self/status")
    if status.exists():
        return 1024 * int(status.read_text(encoding="utf-8").split("VmHWM:")[1].split()[0])
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

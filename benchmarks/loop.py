"""The plain PyTorch loop in a separate process: ``python -m benchmarks.loop RUN THREADS``.

The process runs one round for each line on standard input. It does not use the project's thread and memory settings,
like any plain script. It alternates with an engine round by round, so that both see the same load of the machine.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

from fedbn.federation.run import Run


@dataclass
class Loop:
    """The plain loop of a run, as a context manager.

    Attributes:
        run: the run to train.
        threads: number of torch threads.
        python: interpreter of the process.
        module: module of the process; `benchmarks.peers` runs another simulator instead of the loop.
        wall, cpu: seconds of each round so far.
    """

    run: Run
    threads: int = 2
    python: str = sys.executable
    module: str = "benchmarks.loop"
    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)

    def __enter__(self) -> Self:
        """Start the process and run a warm-up round."""
        command = [self.python, "-m", self.module, self.run.to_json(), str(self.threads)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.round()
        self.wall.clear()
        self.cpu.clear()
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

    def round(self) -> None:
        """Run one round.

        Raises:
            RuntimeError: the process has ended.
        """
        assert self._process.stdin
        assert self._process.stdout
        line = ""
        with suppress(BrokenPipeError):
            self._process.stdin.write("\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.module} exited; see its error above")
        wall, cpu = json.loads(line)
        self.wall.append(wall)
        self.cpu.append(cpu)


def main() -> None:
    """Run a round for each line on standard input."""
    import torch

    from benchmarks.workloads import plain_loop
    from fedbn.federation.setup import build_context

    torch.set_num_threads(int(sys.argv[2]))
    rounds = plain_loop(build_context(Run.from_dict(json.loads(sys.argv[1]))))
    for _ in sys.stdin:
        before = time.process_time()
        wall = next(rounds)
        print(json.dumps([wall, time.process_time() - before]), flush=True)


if __name__ == "__main__":
    main()

"""The bare loop in a process of its own: ``python -m benchmarks.loop RUN`` does a round for every line it is sent.

It is a stranger to the project's settings of threads and memory, as a plain script is, and it can take turns with an
engine round by round, so that both meet the same machine.
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
    """The loop of a run; a context manager.

    Attributes:
        run: what is trained.
        threads: of torch.
        python: interpreter of the process.
        module: what it runs; a peer's simulator in place of the loop (`benchmarks.peers`).
        wall, cpu: seconds of each round so far.
    """

    run: Run
    threads: int = 2
    python: str = sys.executable
    module: str = "benchmarks.loop"
    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)

    def __enter__(self) -> Self:
        """Start, and do a round that does not count."""
        command = [self.python, "-m", self.module, self.run.to_json(), str(self.threads)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.round()
        self.wall.clear()
        self.cpu.clear()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop."""
        assert self._process.stdin
        assert self._process.stdout
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait()

    def round(self) -> None:
        """Do a round.

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
            raise RuntimeError(f"{self.module} has ended; its error is above")
        wall, cpu = json.loads(line)
        self.wall.append(wall)
        self.cpu.append(cpu)


def main() -> None:
    """Serve rounds."""
    import torch

    from benchmarks.workloads import bare_loop
    from fedbn.federation.setup import build_context

    torch.set_num_threads(int(sys.argv[2]))
    rounds = bare_loop(build_context(Run.from_dict(json.loads(sys.argv[1]))))
    for _ in sys.stdin:
        before = time.process_time()
        wall = next(rounds)
        print(json.dumps([wall, time.process_time() - before]), flush=True)


if __name__ == "__main__":
    main()

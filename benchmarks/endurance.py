"""``python -m benchmarks.endurance``: a deployment that works for long while its processes are killed and restarted.

Three SuperNodes serve one federated run after the other. Every so often, but not before a round was completed since
the last time, a SuperNode is killed and another started in its place; one of these times it is the server of the run
that is killed. A run that fails of it is submitted again and goes on from its checkpoint, with what the nodes keep on
disk. Every run must come to the bits of the same run on the grid, that nobody disturbed. What was found so far is in
the file of JSON after every run.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from clients.records import set_threads
from fedbn.config import Plan
from fedbn.federation.run import Run
from fedbn.federation.server import Outcome
from simulations.engines.deployment import await_nodes, deployment, differences, start_node
from simulations.engines.execute import execute
from simulations.flower.processes import POLL_SECONDS
from simulations.flower.superlink import FlowerRunError, SuperLink

USERS = 3
STATES = "states"
SERVER_TURN = 1
"""Which of the kills, counted from 0, is the server's."""

RECOVERY_SECONDS = 240.0
"""A run that fails longer than this after a kill has failed of something else."""

Say = Callable[[str], None]


@dataclass
class Killer:
    """Kills a process of a deployment every so often, and starts a SuperNode anew.

    Attributes:
        link: whose processes.
        folder: of the runs' checkpoints; in ``states``, nodes keep what their users keep.
        every: seconds between two kills, at least.
        most: kills after which it rests; None: it goes on.
        say: told of each.
        kills: what was killed, at which second.
    """

    link: SuperLink
    folder: Path
    every: float
    most: int | None = None
    say: Say = print
    kills: list[dict[str, Any]] = field(default_factory=list)
    last: float = float("-inf")
    began: float = field(default_factory=time.monotonic)
    enough: threading.Event = field(default_factory=threading.Event)
    failure: Exception | None = None

    def work(self) -> None:
        """Kill until it is enough; meant for a thread."""
        try:
            while (self.most is None or len(self.kills) < self.most) and self._time_to_kill():
                turn = len(self.kills)
                if turn == SERVER_TURN:
                    name = "server"
                    self._kill_server()
                else:
                    name = f"supernode-{turn % USERS}"
                    self._restart_node(name, turn % USERS)
                self.last = time.monotonic()
                self.kills.append({"killed": name, "second": round(self.last - self.began, 1)})
                self.say(f"{self.kills[-1]['second']:.0f} s: {name} was killed")
        except Exception as error:  # of a thread of its own: raised where the runs are submitted
            self.failure = error

    def _time_to_kill(self) -> bool:
        """Wait; on a slow machine long enough for progress in between. False if it is enough."""
        before = self._progress()
        over = self.enough.wait(self.every)
        while not over and self._progress() == before:
            over = self.enough.wait(POLL_SECONDS)
        return not over

    def _progress(self) -> set[tuple[str, int]]:
        return {(path.name, path.stat().st_mtime_ns) for path in self.folder.glob("run-*.safetensors")}

    def _restart_node(self, name: str, user: int) -> None:
        process = self.link.family.started[name]
        # The entry is replaced first: the deployment must not be found to have lost a process.
        start_node(self.link, user, USERS, self.folder / STATES)
        process.kill()
        process.wait()

    def _kill_server(self) -> None:
        while not (found := [pid for pid in self.link.family.find() if "flwr-serverapp" in _command(pid)]):
            if self.enough.wait(POLL_SECONDS):
                return
        for pid in found:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def endure(
    seconds: float,
    every: float,
    rounds: int,
    folder: Path,
    write: Callable[[dict[str, Any]], None],
    *,
    most: int | None = None,
    say: Say = print,
) -> dict[str, Any]:
    """Execute runs for so long, with kills, and compare each with the grid.

    Args:
        seconds: after which no further run is begun.
        every: seconds between two kills, at least.
        rounds: of each run.
        folder: for checkpoints and states.
        write: given what was found after each run.
        most: kills in all; None: as many as there is time for.
        say: told of kills and runs.

    Returns:
        Seconds, kills, and for every run its submissions, seconds and differences from the grid.

    Raises:
        FlowerRunError: a run failed for which no kill was to blame, or the deployment did not come back.
    """
    states = folder / STATES
    runs: list[dict[str, Any]] = []
    with deployment(USERS, states=states, say=say) as link:
        killer = Killer(link, folder, every, most, say)
        thread = threading.Thread(target=killer.work, daemon=True)
        thread.start()
        while not runs or time.monotonic() - killer.began < seconds:
            seed = len(runs)
            plan = Plan(rounds=rounds, eval_every=rounds, global_test=60)
            run = Run("digits8:users=3:unseen=1", "fedbn", seed=seed, plan=plan).resolved()
            began = time.monotonic()
            outcome, submissions = insist(killer, run, folder / f"run-{seed}.safetensors")
            spent = time.monotonic() - began
            apart = differences(outcome, execute(run, "grid"))
            memory = _resident(link.family.started["superlink"].pid)
            runs.append(
                {
                    "seed": seed,
                    "rounds": len(outcome.curve),
                    "submissions": submissions,
                    "seconds": round(spent, 1),
                    "superlink bytes": memory,
                    "differences": apart,
                }
            )
            found = {
                "seconds": round(time.monotonic() - killer.began, 1),
                "every": every,
                "kills": killer.kills,
                "runs": runs,
                "state bytes": sum(f.stat().st_size for f in states.iterdir()),
            }
            write(found)
            say(
                f"run {seed}: {len(outcome.curve)} rounds in {spent:.0f} s, submitted {submissions} times, "
                + (f"DIFFERENT: {', '.join(apart)}" if apart else "equal to the last bit")
            )
        killer.enough.set()
        thread.join()
        if killer.failure:
            raise killer.failure
    return found


def insist(killer: Killer, run: Run, checkpoint: Path) -> tuple[Outcome, int]:
    """A run's outcome, and how often it had to be submitted."""
    submissions = 0
    while True:
        submissions += 1
        try:
            return killer.link.execute(run, out=checkpoint), submissions
        except FlowerRunError:
            if killer.failure:
                raise killer.failure from None
            if time.monotonic() - killer.last > RECOVERY_SECONDS:
                raise
            await_nodes(killer.link, USERS)


def _command(pid: int) -> str:
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_text()
    return ""


def _resident(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print and write; 1 if a run differs from the grid's."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.endurance", description=__doc__)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--every", type=float, default=150.0, help="seconds between two kills, at least")
    parser.add_argument("--rounds", type=int, default=6, help="of each run")
    parser.add_argument("--kills", type=int, help="at most so many")
    parser.add_argument("--out", type=Path, default=Path("results/endurance.json"))
    chosen = parser.parse_args(argv)
    set_threads()
    chosen.out.parent.mkdir(parents=True, exist_ok=True)

    def write(found: dict[str, Any]) -> None:
        chosen.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")

    with tempfile.TemporaryDirectory() as folder:
        found = endure(
            chosen.minutes * 60,
            chosen.every,
            chosen.rounds,
            Path(folder),
            write,
            most=chosen.kills,
            say=lambda text: print(text, flush=True),
        )
    return int(any(run["differences"] for run in found["runs"]))


if __name__ == "__main__":
    raise SystemExit(main())

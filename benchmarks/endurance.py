"""``python -m benchmarks.endurance``: a long-running deployment whose processes are killed and restarted.

Three SuperNodes serve one federated run after another. At regular intervals, but only after another round has been
completed, a SuperNode is killed and replaced; one of the kills hits the server of the run instead. A run that fails
because of a kill is submitted again and continues from its checkpoint and the client states on disk. Every run must
match an undisturbed run on the grid bit for bit. The results are written to a JSON file after every run.
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
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.soak import resident_memory
from fedbn.config import Plan
from fedbn.federation.failures import ClientError
from fedbn.federation.run import Run
from fedbn.federation.server import Outcome
from fedbn_clients.records import set_threads
from fedbn_simulations.engines.deployment import await_nodes, deployment, differences, start_node
from fedbn_simulations.engines.execute import execute
from fedbn_simulations.flower.processes import POLL_SECONDS
from fedbn_simulations.flower.superlink import FlowerRunError, SuperLink

USERS = 3
STATES = "states"
SERVER_TURN = 1
"""Index of the kill (from 0) that hits the server."""

RECOVERY_SECONDS = 240.0
"""A failure later than this after a kill is not attributed to the kill."""

Log = Callable[[str], None]


@dataclass
class Killer:
    """Kills a process of a deployment at regular intervals, and restarts SuperNodes.

    Attributes:
        link: the deployment.
        folder: directory of the runs' checkpoints, with the client states in ``states``.
        every: minimum seconds between two kills.
        max_kills: maximum number of kills; None: no limit.
        log: called with a message for each kill.
        kills: process and time of each kill.
        last: time of the last kill.
        start: time at which the killer was created.
        stop: set to end the thread.
        failure: exception of the thread, raised again in the main thread.
    """

    link: SuperLink
    folder: Path
    every: float
    max_kills: int | None = None
    log: Log = print
    kills: list[dict[str, Any]] = field(default_factory=list)
    last: float = float("-inf")
    start: float = field(default_factory=time.monotonic)
    stop: threading.Event = field(default_factory=threading.Event)
    failure: Exception | None = None

    def work(self) -> None:
        """Kill processes until stopped. Runs in its own thread."""
        try:
            while (self.max_kills is None or len(self.kills) < self.max_kills) and self._time_to_kill():
                turn = len(self.kills)
                if turn == SERVER_TURN:
                    name = "server"
                    self._kill_server()
                else:
                    name = f"supernode-{turn % USERS}"
                    self._restart_node(name, turn % USERS)
                self.last = time.monotonic()
                self.kills.append({"killed": name, "second": round(self.last - self.start, 1)})
                self.log(f"{self.kills[-1]['second']:.0f} s: {name} was killed")
        except Exception as error:  # raised again by the main thread
            self.failure = error

    def _time_to_kill(self) -> bool:
        """Wait for the interval and for progress of the run. False if stopped."""
        previous = self._progress()
        stopped = self.stop.wait(self.every)
        while not stopped and self._progress() == previous:
            stopped = self.stop.wait(POLL_SECONDS)
        return not stopped

    def _progress(self) -> set[tuple[str, int]]:
        return {(path.name, path.stat().st_mtime_ns) for path in self.folder.glob("run-*.safetensors")}

    def _restart_node(self, name: str, user: int) -> None:
        process = self.link.processes.started[name]
        # Replace the entry first: otherwise the deployment would report a lost process.
        start_node(self.link, user, USERS, self.folder / STATES)
        process.kill()
        process.wait()

    def _kill_server(self) -> None:
        while not (pids := [pid for pid in self.link.processes.live_pids() if "flwr-serverapp" in _command(pid)]):
            if self.stop.wait(POLL_SECONDS):
                return
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def endure(
    seconds: float,
    every: float,
    rounds: int,
    folder: Path,
    write: Callable[[dict[str, Any]], None],
    *,
    max_kills: int | None = None,
    log: Log = print,
) -> dict[str, Any]:
    """Execute runs while processes are killed, and compare each run with the grid.

    Args:
        seconds: no new run is started after this time.
        every: minimum seconds between two kills.
        rounds: rounds of each run.
        folder: directory for checkpoints and states.
        write: called with the results after each run.
        max_kills: maximum number of kills; None: no limit.
        log: called with messages about kills and runs.

    Returns:
        Seconds, kills, and the submissions, seconds and differences from the grid of every run.

    Raises:
        FlowerRunError: a run failed for another reason than a kill, or the deployment did not recover.
    """
    states = folder / STATES
    runs: list[dict[str, Any]] = []
    with deployment(USERS, state_dir=states, notify=log) as link:
        killer = Killer(link, folder, every, max_kills, log)
        thread = threading.Thread(target=killer.work, daemon=True)
        thread.start()
        while not runs or time.monotonic() - killer.start < seconds:
            seed = len(runs)
            plan = Plan(rounds=rounds, eval_every=rounds, global_test=60)
            run = Run("digits8:users=3:unseen=1", "fedbn", seed=seed, plan=plan).resolved()
            start = time.monotonic()
            outcome, submissions = execute_until_done(killer, run, folder / f"run-{seed}.safetensors")
            elapsed = time.monotonic() - start
            mismatches = differences(outcome, execute(run, "grid", deployed=True))
            memory = resident_memory(link.processes.started["superlink"].pid)
            runs.append({"seed": seed, "rounds": len(outcome.curve), "submissions": submissions})
            runs[-1] |= {"seconds": round(elapsed, 1), "superlink bytes": memory, "differences": mismatches}
            result = {
                "seconds": round(time.monotonic() - killer.start, 1),
                "every": every,
                "kills": killer.kills,
                "runs": runs,
                "state bytes": sum(f.stat().st_size for f in states.iterdir()),
            }
            write(result)
            log(
                f"run {seed}: {len(outcome.curve)} rounds in {elapsed:.0f} s, submitted {submissions} times, "
                + (f"DIFFERENT: {', '.join(mismatches)}" if mismatches else "bit-identical to the grid")
            )
        killer.stop.set()
        thread.join()
        if killer.failure:
            raise killer.failure
    return result


def execute_until_done(killer: Killer, run: Run, checkpoint: Path) -> tuple[Outcome, int]:
    """Submit a run until it completes. Returns its outcome and the number of submissions."""
    submissions = 0
    while True:
        submissions += 1
        try:
            return killer.link.execute(run, out=checkpoint), submissions
        except (FlowerRunError, ClientError):
            if killer.failure:
                raise killer.failure from None
            if time.monotonic() - killer.last > RECOVERY_SECONDS:
                raise
            await_nodes(killer.link, USERS)


def _command(pid: int) -> str:
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_text()
    return ""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark and write the results. Returns 1 if a run differs from the grid."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.endurance", description=__doc__)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--every", type=float, default=150.0, help="minimum seconds between two kills")
    parser.add_argument("--rounds", type=int, default=6, help="rounds of each run")
    parser.add_argument("--kills", type=int, help="maximum number of kills")
    parser.add_argument("--out", type=Path, default=Path("results/endurance.json"))
    args = parser.parse_args(argv)
    set_threads()
    args.out.parent.mkdir(parents=True, exist_ok=True)

    def write(result: dict[str, Any]) -> None:
        args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")

    log = partial(print, flush=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        result = endure(args.minutes * 60, args.every, args.rounds, folder, write, max_kills=args.kills, log=log)
    return int(any(run["differences"] for run in result["runs"]))


if __name__ == "__main__":
    raise SystemExit(main())

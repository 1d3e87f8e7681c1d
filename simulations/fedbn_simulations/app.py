"""The ServerApp: training rounds, synchronization of statistics and evaluation, shared by all engines.

Replies are sorted by user before anything is summed, so the result does not depend on the order of arrival.
"""

from __future__ import annotations

from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedbn.config import parts
from fedbn.errors import UserError
from fedbn.federation.labeled_sums import require_sums
from fedbn.federation.run import Run
from fedbn.federation.setup import build_context
from fedbn_clients.config import run_from_config
from fedbn_clients.records import set_threads
from fedbn_simulations.server.keys import UserKeys, read_keys
from fedbn_simulations.server.nodes import REPLY_SECONDS, WAIT_SECONDS
from fedbn_simulations.server.rounds import Listener, _listener, run_rounds
from fedbn_simulations.server.safeguards import Safeguards
from fedbn_simulations.storage.checkpoint import load_latest, previous_checkpoint, save_outcome

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Execute the run that the run-config describes, or the rest of it.

    With ``out`` in the run-config, the server writes a checkpoint to that file after every round, and the same run with
    the same file resumes from it. ``wait`` and ``timeout`` limit the seconds for which it waits for nodes and replies.
    ``sums`` names alignments and heads, such as ``"rotation,matched"``, for which the clients send sums after training.
    ``users`` names a file that binds each user to the public key of a node (`fedbn_simulations.server.keys`).
    """
    set_threads()
    run = run_from_config(context.run_config)
    out = str(context.run_config.get("out", ""))
    listener = _checkpoints(Path(out), run) if out else _listener.get()
    safeguards = Safeguards.from_config(context.run_config)
    sums = parts(str(context.run_config.get("sums", "")))
    if sums:
        require_sums(build_context(run), sums)
    resume = listener.resume if out and listener else None
    if not (resume and resume.scores and set(sums) <= resume.sums.keys()):
        timeout = _seconds(context, "timeout", REPLY_SECONDS)
        wait = _seconds(context, "wait", WAIT_SECONDS)
        run_rounds(grid, run, listener, timeout, wait, _keys(context, run), safeguards, sums)


def _seconds(context: Context, name: str, default: float) -> float:
    """A duration in the run-config.

    Raises:
        UserError: not a positive number.
    """
    value = context.run_config.get(name, default)
    if isinstance(value, bool | str) or not 0 < value < float("inf"):
        raise UserError(f"{name}={value!r} in the run config: give a positive number of seconds")
    return float(value)


def _keys(context: Context, run: Run) -> UserKeys | None:
    path = str(context.run_config.get("users", ""))
    return read_keys(Path(path), len(build_context(run).population.users)) if path else None


def _checkpoints(path: Path, run: Run) -> Listener:
    sources = build_context(run).population.sources
    return Listener(
        resume=load_latest(path, run, sources),
        on_round=lambda number, outcome: save_outcome(path, run, outcome, sources, previous_checkpoint(path)),
        on_end=lambda outcome: previous_checkpoint(path).unlink(missing_ok=True),
    )

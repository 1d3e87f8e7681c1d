"""The ServerApp: rounds of training, statistics settled, the evaluation matrix; the same under every engine.

Replies are put in the order of their users before anything is summed, so a run does not depend on who answers
first.
"""

from __future__ import annotations

from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from clients.config import run_from_config
from clients.records import set_threads
from fedbn.federation.run import Run
from fedbn.federation.setup import build_context
from simulations.server.rounds import Listener, _listener, run_rounds
from simulations.storage.checkpoint import before, load_latest, save_outcome

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Conduct the run that the run-config describes, or what is left of it.

    With ``out`` in the run-config, that file holds the run as far as it has got, after every round; the same run with
    the same file goes on from there.
    """
    set_threads()
    run = run_from_config(context.run_config)
    out = str(context.run_config.get("out", ""))
    listener = _checkpoints(Path(out), run) if out else _listener.get()
    if not (out and listener and listener.resume and listener.resume.scores):
        run_rounds(grid, run, listener, float(context.run_config.get("timeout", 0)))


def _checkpoints(path: Path, run: Run) -> Listener:
    sources = build_context(run).population.sources
    return Listener(
        resume=load_latest(path, run, sources),
        on_round=lambda number, outcome: save_outcome(path, run, outcome, sources, before(path)),
        on_end=lambda outcome: before(path).unlink(missing_ok=True),
    )

"""One run of a user's Flower app under a normalization strategy, with the metrics that the app itself reports."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import chdir, contextmanager, redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TextIO

from flwr.app import Context, Message, RecordDict
from flwr.serverapp import Grid

from fedbn.errors import UserError
from fedbn_simulations.engines.grid import FIRST_NODE
from fedbn_simulations.engines.simulation import DEFAULT_SUPERNODES, run_simulation
from fedbn_simulations.flower.apps import FlowerApp
from fedbn_simulations.flower.normalized import normalized
from fedbn_simulations.storage.provenance import NUMERICS, code_digest

LOG = "run.log"
"""Log of a run, in its directory: the messages of Flower, and what the app prints."""

FILES = "files"
"""Working directory of the app of a run, in the directory of the run."""

COUNTS = ("num-examples", "num_examples")
"""Names of the number of examples in Flower's message API and in its former API."""

SEED_KEYS = ("seed", "random-seed", "random_seed")
"""Keys of an app's run-config that are set to the seed of a run."""


LOWER_IS_BETTER = ("loss", "mse", "mae", "rmse", "error", "nll", "perplexity")
"""Parts of the names of metrics of which lower values are better."""

ACCURACIES = ("acc", "f1")
"""Parts of the names of the metrics that are displayed first."""


@dataclass(frozen=True)
class AppRun:
    """A run of an app.

    Attributes:
        app: absolute path of the directory of the app.
        digest: digest of its files.
        model: reference of its model; None: that of its pyproject.toml.
        num_supernodes: number of nodes; None: its default.
        run_config: overrides of its run-config.
        strategy: normalization strategy.
        seed: seed of the global random numbers.
    """

    app: str
    digest: str
    model: str | None
    num_supernodes: int | None
    run_config: tuple[str, ...]
    strategy: str
    seed: int


def settings_of(run: AppRun) -> dict[str, Any]:
    """A run in the form in which its result has it."""
    return asdict(run) | {"run_config": list(run.run_config)}


@dataclass
class Evaluations:
    """The metrics in the replies of the clients.

    Attributes:
        by_kind: metrics by kind of message (``train`` or ``evaluate``), number of the round and node.
        last: the last message of each kind.
        errors: reasons of the error replies.
    """

    by_kind: dict[str, dict[int, dict[int, dict[str, float]]]] = field(default_factory=dict)
    last: dict[str, Message] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)

    def add(self, message: Message, reply: Message) -> None:
        """Record a reply."""
        kind, node = message.metadata.message_type.partition(".")[0], message.metadata.dst_node_id
        if reply.has_error():
            self.errors.append(str(reply.error.reason))
        elif kind in ("train", "evaluate") and (found := numbers_of(reply.content)):
            rounds = self.by_kind.setdefault(kind, {})
            number = _round(message) or 1 + sum(node in nodes for nodes in rounds.values())
            rounds.setdefault(number, {})[node] = found
            self.last[kind] = message

    def complete(self, grid: Grid) -> None:
        """Send the last evaluation to the nodes that the server did not select for it."""
        message = self.last.get("evaluate")
        if message is None:
            return
        done = self.by_kind["evaluate"][max(self.by_kind["evaluate"])]
        rest = [node for node in grid.get_node_ids() if node not in done]
        group = message.metadata.group_id
        grid.send_and_receive(
            [Message(message.content, node, message.metadata.message_type, group_id=group) for node in rest]
        )


def numbers_of(content: RecordDict) -> dict[str, float]:
    """All numbers in the records of metrics; in Flower's former API, some are in a config record."""
    records: list[Mapping[str, Any]] = [*content.metric_records.values(), *content.config_records.values()]
    return {
        name: float(value)
        for record in records
        for name, value in record.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }


def directions(names: Iterable[str]) -> dict[str, bool]:
    """The metrics among names, and whether higher is better; the one to display is first.

    >>> directions(["eval_loss", "eval_acc", "num-examples"])
    {'eval_acc': True, 'eval_loss': False}
    """
    known = {n: not any(part in n.lower() for part in LOWER_IS_BETTER) for n in names if n not in COUNTS}
    return dict(sorted(known.items(), key=lambda item: not any(part in item[0].lower() for part in ACCURACIES)))


def _round(message: Message) -> int | None:
    """Number of the round of a message, from its config or its group; None if neither has it."""
    for record in message.content.config_records.values():
        if isinstance(number := record.get("server-round"), int):
            return number
    return int(message.metadata.group_id) if message.metadata.group_id.isdigit() else None


def execute_app(run: AppRun, log: TextIO, directory: Path) -> dict[str, Any]:
    """Execute a run.

    Args:
        run: the run.
        log: receives the messages of Flower, and what the app prints.
        directory: working directory of the app, so that runs at the same time do not write the same files.

    Returns:
        The result, with the metrics of every client in the last evaluation, and their means in each round.

    Raises:
        UserError: the app or the strategy is not valid, or no client reports metrics.
        Exception: raised by the ServerApp.
    """
    app = FlowerApp.read(Path(run.app))
    config = app.run_config(run.run_config)
    config |= {name: run.seed for name in SEED_KEYS if name in config}
    nodes = run.num_supernodes or app.num_supernodes or DEFAULT_SUPERNODES
    evaluations = Evaluations()
    start = time.perf_counter()
    with _logged(log), chdir(directory), normalized(app, run.model, run.strategy) as components:

        def serve(grid: Grid, context: Context) -> None:
            components.server(grid=grid, context=context)
            evaluations.complete(grid)

        run_simulation(serve, components.client, nodes, run_config=config, seed=run.seed, on_reply=evaluations.add)
    return {
        "run": settings_of(run),
        "numerics": NUMERICS,
        "code": code_digest(),
        "strategy": run.strategy,
        "seed": run.seed,
        "seconds": time.perf_counter() - start,
        # Local entries are sent back as they were received, so all entries travel in both directions.
        "ownership": [
            {**row, "bytes_down": row["bytes"], "bytes_up": row["bytes"]} for row in components.ownership.rows()
        ],
        "lr": float("nan"),
        "newcomer": "the initial values",
        "execution": {},
        **_table(evaluations),
    }


def _table(evaluations: Evaluations) -> dict[str, Any]:
    """The fields of a result with metrics."""
    kind = "evaluate" if "evaluate" in evaluations.by_kind else "train"
    rounds = evaluations.by_kind.get(kind)
    if not rounds:
        reason = f": {evaluations.errors[0]}" if evaluations.errors else ""
        raise UserError(f"the clients of the app report no metrics{reason}")
    notices = [] if kind == "evaluate" else ["The clients do not evaluate: the metrics are those of their training."]
    if evaluations.errors:
        notices.append(f"{len(evaluations.errors)} replies were errors, such as {evaluations.errors[0]!r}.")
    training = {number: _means(nodes) for number, nodes in evaluations.by_kind.get("train", {}).items()}
    means = {number: _means(nodes) for number, nodes in rounds.items()}
    metrics = list(directions(dict.fromkeys(name for values in means.values() for name in values)))
    return {
        "rounds": max(rounds),
        "metrics": metrics,
        "evaluations": [
            {
                "user": str(node - FIRST_NODE),
                "domain": "",
                "row": "own",
                "column": "aggregated",
                "n": int(next((values[name] for name in COUNTS if name in values), 1)),
                **{name: values[name] for name in metrics if name in values},
            }
            for node, values in sorted(rounds[max(rounds)].items())
        ],
        "curve": [
            {
                "round": number,
                "train_loss": next((v for k, v in training.get(number, {}).items() if "loss" in k), None),
                "own": means[number].get(metrics[0]),
                "unseen": None,
            }
            for number in sorted(means)
        ],
        "notices": notices,
    }


def _means(by_node: dict[int, dict[str, float]]) -> dict[str, float]:
    """Mean of each metric over the nodes that report it."""
    names = directions(dict.fromkeys(name for values in by_node.values() for name in values))
    return {n: sum(found) / len(found) for n in names if (found := [v[n] for v in by_node.values() if n in v])}


@contextmanager
def _logged(log: TextIO) -> Iterator[None]:
    """Write the messages of Flower and all output of an app to a file."""
    logger = logging.getLogger("flwr")
    handlers, handler = list(logger.handlers), logging.StreamHandler(log)
    logger.handlers[:] = [handler]
    try:
        with redirect_stdout(log), redirect_stderr(log):
            yield
    finally:
        logger.handlers[:] = handlers

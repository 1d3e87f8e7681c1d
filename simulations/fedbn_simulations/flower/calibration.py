"""What the server of any Flower app asks the clients for, if their mod has unlabeled data (``calibration``).

The mod `fedbn_clients.mods.normalization` answers these messages in place of the app.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, RecordDict
from flwr.serverapp import Grid

from fedbn.errors import UserError
from fedbn.nn.roles import State
from fedbn.online.prior import population_prior_from
from fedbn.statistics.consensus import run_consensus, unflatten
from fedbn.statistics.moments import Moments
from fedbn.strategies.global_naive import GlobalNaive
from fedbn_clients.entries import ARRAYS, Entries, ModelFn, build, entries
from fedbn_clients.mods import MOMENTS, SUMMARIES, SYNC
from fedbn_clients.records import aggregates_to, arrays, prior_to, tensors


def population_prior(
    grid: Grid, current: ArrayRecord, model_fn: ModelFn, nodes: Iterable[int] | None = None
) -> ArrayRecord:
    """Statistics with which new clients start, and their weight, from the differences between clients.

    Each client measures its unlabeled windows under the server's arrays (`fedbn.online.prior.summarize_windows`), and
    the server computes mean, variance and weight ``n0`` per channel (`fedbn.online.prior.population_prior_from`). The
    result equals that of `fedbn.online.population_prior` on the windows of all clients bit for bit.

    The clients need ``mods=[normalization(model_fn, ..., calibration=...)]``, and the app a function for evaluation. To
    use the prior, send it in the record ``fedbn.prior`` of the messages in which clients with
    ``adaptation(model_fn, "population")`` predict.

    Args:
        grid: the ServerApp's grid.
        current: the arrays of the model, such as ``strategy.start(...).arrays``.
        model_fn: function or class that builds the app's network.
        nodes: the nodes to ask; None: all.

    Raises:
        UserError: a client does not answer, or fewer than two clients have two windows.
    """
    chosen = list(grid.get_node_ids() if nodes is None else nodes)
    content = RecordDict({ARRAYS: current, SUMMARIES: ConfigRecord()})
    model = build(model_fn, _state(current, entries(model_fn, GlobalNaive())))
    return prior_to(population_prior_from(model, _ask(grid, content, chosen)))


def synchronize(
    grid: Grid, current: ArrayRecord, table: Entries, model_fn: ModelFn, nodes: Sequence[int]
) -> ArrayRecord:
    """Arrays with the statistics on which clients agree (`fedbn.strategies.base.NormStrategy.sync_statistics`).

    Raises:
        UserError: a client does not answer, for example because its app has no mod with data for calibration.
    """

    def query(aggregates: list[dict[str, Moments]]) -> list[dict[str, Moments] | None]:
        content = RecordDict({ARRAYS: current, SYNC: ConfigRecord(), **aggregates_to(aggregates)})
        return [unflatten(reply) or None for reply in _ask(grid, content, nodes)]

    aggregates = list(run_consensus(query))
    model = build(model_fn, _state(current, table))
    table.strategy.load_statistics(model, aggregates)
    state, names = model.state_dict(), table.names(current)
    synchronized = arrays({name: state[name] for name in table.ownership.shared_statistics})
    return ArrayRecord({k: synchronized.get(names[k], a) for k, a in current.items()})


def _state(record: ArrayRecord, table: Entries) -> State:
    names = table.names(record)
    return {names[k]: torch.from_numpy(a.numpy()) for k, a in record.items()}


def _ask(grid: Grid, content: RecordDict, nodes: Sequence[int]) -> list[State]:
    """The record of each client's reply."""
    # The app needs a function for the type of a message, and every app with statistics evaluates.
    messages = [Message(content, node, MessageType.EVALUATE) for node in nodes]
    replies = {reply.metadata.src_node_id: reply for reply in grid.send_and_receive(messages)}
    return [_measured(replies.get(node)) for node in nodes]


def _measured(reply: Message | None) -> State:
    record = reply.content.array_records.get(MOMENTS) if reply is not None and reply.has_content() else None
    if record is None:
        reason = "no reply" if reply is None else reply.error.reason if reply.has_error() else "no moments"
        raise UserError(
            f"a client does not measure its statistics ({reason}): give its ClientApp a function for evaluation "
            "and mods=[normalization(..., calibration=...)]"
        )
    return tensors(record)

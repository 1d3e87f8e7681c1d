"""The ClientApp: the message handlers of a user's device, shared by all engines.

The client state is stored only in ``Context.state``. Entries that a strategy declares local are never part of a reply.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import lru_cache
from typing import cast

from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from fedbn.errors import UserError
from fedbn.federation.context import CENTRAL_TRAINER, RunContext
from fedbn.federation.labeled_sums import client_sums, parse_sums_method
from fedbn.federation.metrics import Column
from fedbn.federation.protection import protect_update
from fedbn.federation.run import Run
from fedbn.federation.setup import MAX_CONTEXTS, build_context, build_context_for
from fedbn.nn.roles import Role, State
from fedbn.scenarios.remote import load_node_user
from fedbn.stacked.cohort import CohortResult, CohortRound
from fedbn.stacked.executors import ClientExecutor
from fedbn.statistics.consensus import flatten
from fedbn.statistics.moments import Moments
from fedbn.strategies.base import Progress
from fedbn_clients.config import Scalar, run_from_config
from fedbn_clients.errors import report_errors
from fedbn_clients.jobs import Evaluate, SyncFirstBatch, SyncStatistics, Train, execute
from fedbn_clients.persistence import client_state_on_disk
from fedbn_clients.records import (
    Decoder,
    aggregates_from,
    client_statistics_from,
    scores_to,
    set_threads,
    tensors,
    to_record_by_reference,
)

MAX_USERS = 2**31
"""Maximum number of users; larger numbers do not fit into Flower's records."""

app = ClientApp(mods=[report_errors, client_state_on_disk])
_decode = Decoder()


@lru_cache(maxsize=MAX_CONTEXTS)
def _build_context(text: str) -> RunContext:
    return build_context(run_from_config({"run": text}))


def _run_context(run_config: Mapping[str, Scalar]) -> RunContext:
    set_threads()
    # All clients of a process share one text of the run; comparing `Run` objects takes longer than a small step.
    text = run_config.get("run")
    return _build_context(str(text)) if text else build_context(run_from_config(run_config))


def _context(context: Context) -> RunContext:
    ctx = _run_context(context.run_config)
    data = context.node_config.get("data")
    if not ctx.population.remote:
        if not data:
            return ctx
        raise UserError(
            f"this node has data={data}, but scenario {ctx.run.scenario} provides its own data: use scenario remote"
        )
    if not data:
        raise UserError(f'scenario {ctx.run.scenario}: set this node\'s data in its node config, as data="PATH"')
    return _build_context_with_data(ctx.run, _user(context), str(data))


@lru_cache(maxsize=1)
def _build_context_with_data(run: Run, user: int, path: str) -> RunContext:
    population = build_context(run).population
    user_data = load_node_user(run.scenario, path)
    if user_data.train.x.shape[1:] != population.shape:
        shape = list(user_data.train.x.shape[1:])
        raise UserError(f"{path} holds examples of shape {shape}, not {list(population.shape)}")
    user_data = replace(user_data, train=user_data.train.to(run.device), test=user_data.test.to(run.device))
    users = [user_data if i == user else other for i, other in enumerate(population.users)]
    return build_context_for(run, replace(population, users=tuple(users)))


def _user(context: Context) -> int:
    user = context.node_config.get("partition-id")
    if not isinstance(user, int) or isinstance(user, bool) or not 0 <= user < MAX_USERS:
        raise UserError(f"partition-id={user!r} in this node's config: give the number of its user, as partition-id=0")
    return user


def _inputs(
    message: Message, context: Context, *, evaluate: bool = False
) -> tuple[RunContext, int, State, State | None]:
    """The first fields of every job: context of the run, user, received state and client state."""
    ctx = _context(context)
    user = CENTRAL_TRAINER if ctx.strategy.is_centralized and not evaluate else _user(context)
    received = _decode(cast(ArrayRecord, message.content["arrays"]), ctx.run.device)
    return ctx, user, received, _optional(context.state, f"client-state-{user}", ctx.run.device) or None


def _optional(records: RecordDict, name: str, device: str) -> State:
    return tensors(cast(ArrayRecord, records[name]), device) if name in records else {}


def _lost_client_state(message: Message, context: Context, user: int) -> bool:
    """Whether the node has lost client state that it should still have."""
    config = cast(ConfigRecord, message.content["config"])
    return bool(config.get("trained", False)) and f"client-state-{user}" not in context.state


def _affects_model(ctx: RunContext, client_state: Iterable[str]) -> bool:
    """Whether the entries influence a user's model, which counters do not."""
    return any(ctx.ownership.roles.get(name) is not Role.COUNTER for name in client_state)


def _progress(message: Message) -> Progress:
    config = cast(ConfigRecord, message.content["config"])
    return Progress(cast(int, config["round"]), cast(int, config["rounds"]), bool(config["known"]))


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train for one round; reply with the shared entries and store the others."""
    inputs, progress = _inputs(message, context), _progress(message)
    ctx, user, received, _ = inputs
    lost = _lost_client_state(message, context, user)
    broadcast = _optional(message.content, "broadcast", ctx.run.device)
    update, client_state = execute(Train(*inputs, progress, aggregates_from(message.content), broadcast))
    update = protect_update(ctx, update, received, progress)
    context.state[f"client-state-{user}"] = to_record_by_reference(client_state)
    metrics = MetricRecord({"num-examples": update.examples, "loss": update.loss})
    content = RecordDict({"arrays": to_record_by_reference(update.state), "metrics": metrics})
    if update.notes:
        content["notes"] = to_record_by_reference(update.notes)
    if lost and _affects_model(ctx, client_state):
        content["lost"] = ConfigRecord()
    return Message(content, reply_to=message)


def train_cohort(
    run_config: Mapping[str, Scalar], cohort: CohortRound, executor: ClientExecutor, max_state_bytes: float
) -> CohortResult | None:
    """What the handler `train` does, for many clients of this process at once.

    Args:
        run_config: the run-config of the clients' contexts.
        cohort: the round and its clients.
        executor: executor of the clients' jobs.
        max_state_bytes: largest client state that may be kept in memory.

    Returns:
        The result; None if the clients cannot train stacked.
    """
    return executor.train_cohort(_run_context(run_config), cohort, max_state_bytes)


@app.query("sync_first_batch")
def sync_first_batch(message: Message, context: Context) -> Message:
    """Return the next moments of the round's first batch; an empty record ends the exchange."""
    job = SyncFirstBatch(*_inputs(message, context), _progress(message), aggregates_from(message.content))
    return _moments_reply(message, execute(job))


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Score the user's model on the requested rows and columns."""
    inputs = _inputs(message, context, evaluate=True)
    ctx, user, *_ = inputs
    config = cast(ConfigRecord, message.content["config"])
    record = cast(ArrayRecord | None, message.content.get("client_statistics"))
    client_statistics = None if record is None else client_statistics_from(record, ctx.run.device)
    columns, globally = (_columns(config[name]) for name in ("columns", "globally"))
    job = Evaluate(*inputs, columns, globally, client_statistics, final=bool(config["final"]))
    content = RecordDict({"metrics": scores_to(execute(job))})
    if _affects_model(ctx, ctx.ownership.retained) and _lost_client_state(message, context, user):
        content["lost"] = ConfigRecord()
    return Message(content, reply_to=message)


def _columns(value: object) -> tuple[Column, ...]:
    return cast(tuple[Column, ...], tuple(cast(list[str], value)))


def _moments_reply(message: Message, moments: dict[str, Moments] | None) -> Message:
    record = ArrayRecord() if moments is None else to_record_by_reference(flatten(moments))
    return Message(RecordDict({"moments": record}), reply_to=message)


@app.query("sync_statistics")
def sync_statistics(message: Message, context: Context) -> Message:
    """Return the next moments for the synchronization of statistics; an empty record ends the exchange."""
    job = SyncStatistics(*_inputs(message, context), aggregates_from(message.content))
    return _moments_reply(message, execute(job))


@app.query("labeled_sums")
def labeled_sums(message: Message, context: Context) -> Message:
    """Return the labeled sums of an alignment or a matched head under the served model."""
    ctx, user, served, _ = _inputs(message, context, evaluate=True)
    config = cast(ConfigRecord, message.content["config"])
    method, number = parse_sums_method(str(config["method"])), cast(int, config["number"])
    broadcast = _optional(message.content, "broadcast", ctx.run.device)
    model = ctx.load(ctx.assemble(served, None))
    sums = client_sums(ctx, user, model, method, number, broadcast)
    return Message(RecordDict({"sums": to_record_by_reference(sums)}), reply_to=message)


@app.query("partition")
def partition(message: Message, context: Context) -> Message:
    """Return the partition id of this node and the number of partitions; unlike node ids, they are not random."""
    nodes = context.node_config.get("num-partitions", 0)
    if not isinstance(nodes, int) or not 0 <= nodes <= MAX_USERS:
        raise UserError(f"num-partitions={nodes!r} in this node's config: give the number of users, or leave it out")
    info = ConfigRecord({"partition-id": _user(context), "num-partitions": int(nodes)})
    return Message(RecordDict({"info": info}), reply_to=message)

"""The ClientApp: what a user's device does with a message, under every engine.

A client's own entries live in ``Context.state`` and nowhere else; what a strategy calls local is never put
into a reply.
"""

from __future__ import annotations

from typing import cast

from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from clients.config import run_from_config
from clients.jobs import Evaluate, Settle, Train, execute
from clients.records import Decoder, answers_from, arrays, scores_to, set_threads, tensors
from fedbn.evaluation import Column
from fedbn.recalibration import flatten
from fedbn.roles import State
from fedbn.setting import EVERYONE, Setting, setting
from fedbn.strategy import Progress

app = ClientApp()
_decode = Decoder()


def _here(context: Context) -> Setting:
    set_threads()
    return setting(run_from_config(context.run_config))


def _user(context: Context) -> int:
    return int(context.node_config["partition-id"])


def _trainer(here: Setting, context: Context) -> int:
    return EVERYONE if here.strategy.gathers else _user(context)


def _kept(here: Setting, context: Context, user: int) -> State | None:
    record = context.state.array_records.get(f"kept-{user}")
    return None if record is None else tensors(record, here.run.device)


def _received(here: Setting, message: Message) -> State:
    return _decode(message.content.array_records["arrays"], here.run.device)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train for a round; reply with what travels, keep what stays."""
    here = _here(context)
    user = _trainer(here, context)
    config = message.content.config_records["config"]
    progress = Progress(cast(int, config["round"]), cast(int, config["rounds"]))
    update, kept = execute(Train(here, user, _received(here, message), _kept(here, context, user), progress))
    context.state[f"kept-{user}"] = arrays(kept)
    content = RecordDict(
        {
            "arrays": arrays(update.state),
            "metrics": MetricRecord({"num-examples": update.examples, "loss": update.loss}),
        }
    )
    return Message(content, reply_to=message)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Score the user's model on the rows and columns asked for."""
    here = _here(context)
    user = _user(context)
    config = message.content.config_records["config"]
    columns = cast(tuple[Column, ...], tuple(cast(list[str], config["columns"])))
    job = Evaluate(
        here,
        user,
        _received(here, message),
        _kept(here, context, user),
        columns,
        cast(bool, config["globally"]),
    )
    return Message(RecordDict({"metrics": scores_to(execute(job))}), reply_to=message)


@app.query("settle")
def settle(message: Message, context: Context) -> Message:
    """Say the next moments in agreeing on statistics; an empty record ends the conversation."""
    here = _here(context)
    user = _trainer(here, context)
    said = execute(
        Settle(here, user, _received(here, message), _kept(here, context, user), answers_from(message.content))
    )
    record = ArrayRecord() if said is None else arrays(flatten(said))
    return Message(RecordDict({"moments": record}), reply_to=message)


@app.query("partition")
def partition(message: Message, context: Context) -> Message:
    """Tell which user this node serves, and of how many: node ids are random, partition ids are not."""
    nodes = int(context.node_config.get("num-partitions", 0))
    info = ConfigRecord({"partition-id": _user(context), "num-partitions": nodes})
    return Message(RecordDict({"info": info}), reply_to=message)

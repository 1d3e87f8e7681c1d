"""The ClientApp: what a user's device does with a message, under every engine.

A client's own entries live in ``Context.state`` and nowhere else; what a strategy calls local is never put
into a reply.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from functools import lru_cache
from typing import cast

from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from clients.config import run_from_config
from clients.jobs import Consult, Evaluate, Settle, Train, execute
from clients.persistence import kept_on_disk
from clients.records import Decoder, answers_from, arrays, handed, registry_from, scores_to, set_threads, tensors
from fedbn.errors import UserError
from fedbn.federation.context import EVERYONE, Setting
from fedbn.federation.metrics import Column
from fedbn.federation.protection import protected
from fedbn.federation.run import Run
from fedbn.federation.setup import setting, setting_for
from fedbn.nn.roles import Role, State
from fedbn.scenarios.remote import own
from fedbn.statistics.consensus import flatten
from fedbn.statistics.moments import Moments
from fedbn.strategies.base import Progress

app = ClientApp(mods=[kept_on_disk])
_decode = Decoder()


@lru_cache(maxsize=1)
def _setting(text: str) -> Setting:
    return setting(run_from_config({"run": text}))


def _here(context: Context) -> Setting:
    set_threads()
    # A whole run as text is one object for all clients of a process; comparing runs takes longer than a small step.
    text = context.run_config.get("run")
    here = _setting(str(text)) if text else setting(run_from_config(context.run_config))
    data = context.node_config.get("data")
    if not here.population.remote and not data:
        return here
    if not here.population.remote:
        raise UserError(f"this node has data={data}, but scenario {here.run.scenario} has data of its own: use remote")
    if not data:
        raise UserError(f'scenario {here.run.scenario}: name this node\'s data in its node config, as data="PATH"')
    return _with_own_data(here.run, _user(context), str(data))


@lru_cache(maxsize=1)
def _with_own_data(run: Run, user: int, path: str) -> Setting:
    people = setting(run).population
    mine = own(run.scenario, path)
    if mine.train.x.shape[1:] != people.shape:
        raise UserError(f"{path} holds examples of shape {list(mine.train.x.shape[1:])}, not {list(people.shape)}")
    mine = replace(mine, train=mine.train.to(run.device), test=mine.test.to(run.device))
    users = [mine if i == user else other for i, other in enumerate(people.users)]
    return setting_for(run, replace(people, users=tuple(users)))


def _user(context: Context) -> int:
    return int(context.node_config["partition-id"])


def _trainer(here: Setting, context: Context) -> int:
    return EVERYONE if here.strategy.gathers else _user(context)


def _kept(here: Setting, context: Context, user: int) -> State | None:
    return _optional(context.state, f"kept-{user}", here.run.device) or None


def _optional(records: RecordDict, name: str, device: str) -> State:
    return tensors(cast(ArrayRecord, records[name]), device) if name in records else {}


def _lost(message: Message, context: Context, user: int) -> bool:
    """Whether this node should still have what its user kept, and has not: its memory and disk are gone."""
    config = cast(ConfigRecord, message.content["config"])
    return bool(config.get("trained", False)) and f"kept-{user}" not in context.state


def _matters(here: Setting, kept: Iterable[str]) -> bool:
    """Whether a user's model would be another without these entries; it computes nothing with counters."""
    return any(here.ownership.roles.get(name) is not Role.COUNTER for name in kept)


def _progress(message: Message) -> Progress:
    config = cast(ConfigRecord, message.content["config"])
    return Progress(cast(int, config["round"]), cast(int, config["rounds"]), bool(config["met"]))


def _received(here: Setting, message: Message) -> State:
    return _decode(cast(ArrayRecord, message.content["arrays"]), here.run.device)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train for a round; reply with what travels, keep what stays."""
    here = _here(context)
    user = _trainer(here, context)
    received, progress, lost = _received(here, message), _progress(message), _lost(message, context, user)
    update, kept = execute(
        Train(
            here,
            user,
            received,
            _kept(here, context, user),
            progress,
            answers_from(message.content),
            _optional(message.content, "told", here.run.device),
        )
    )
    update = protected(here, update, received, progress)
    context.state[f"kept-{user}"] = handed(kept)
    content = RecordDict(
        {
            "arrays": handed(update.state),
            "metrics": MetricRecord({"num-examples": update.examples, "loss": update.loss}),
        }
    )
    if update.notes:
        content["notes"] = handed(update.notes)
    if lost and _matters(here, kept):
        content["lost"] = ConfigRecord()
    return Message(content, reply_to=message)


@app.query("consult")
def consult(message: Message, context: Context) -> Message:
    """Say the next moments of the round's first batch; an empty record ends the conversation."""
    here = _here(context)
    user = _trainer(here, context)
    said = execute(
        Consult(
            here,
            user,
            _received(here, message),
            _kept(here, context, user),
            _progress(message),
            answers_from(message.content),
        )
    )
    return Message(_said(said), reply_to=message)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Score the user's model on the rows and columns asked for."""
    here = _here(context)
    user = _user(context)
    config = cast(ConfigRecord, message.content["config"])
    registry = cast(ArrayRecord | None, message.content.get("registry"))
    job = Evaluate(
        here,
        user,
        _received(here, message),
        _kept(here, context, user),
        _columns(config["columns"]),
        _columns(config["globally"]),
        None if registry is None else registry_from(registry, here.run.device),
    )
    content = RecordDict({"metrics": scores_to(execute(job))})
    if _matters(here, here.ownership.kept) and _lost(message, context, user):
        content["lost"] = ConfigRecord()
    return Message(content, reply_to=message)


def _columns(value: object) -> tuple[Column, ...]:
    return cast(tuple[Column, ...], tuple(cast(list[str], value)))


def _said(moments: dict[str, Moments] | None) -> RecordDict:
    return RecordDict({"moments": ArrayRecord() if moments is None else arrays(flatten(moments))})


@app.query("settle")
def settle(message: Message, context: Context) -> Message:
    """Say the next moments in agreeing on statistics; an empty record ends the conversation."""
    here = _here(context)
    user = _trainer(here, context)
    said = execute(
        Settle(here, user, _received(here, message), _kept(here, context, user), answers_from(message.content))
    )
    return Message(_said(said), reply_to=message)


@app.query("partition")
def partition(message: Message, context: Context) -> Message:
    """Tell which user this node serves, and of how many: node ids are random, partition ids are not."""
    nodes = int(context.node_config.get("num-partitions", 0))
    info = ConfigRecord({"partition-id": _user(context), "num-partitions": nodes})
    return Message(RecordDict({"info": info}), reply_to=message)

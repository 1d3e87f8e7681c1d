"""The only module that touches Flower internals; a contract test checks each against the installed version.

An own `Grid` cannot do without the first three of them:

* ``TaskIdentity``: ``Message(content, dst_node_id, message_type)`` reads the process-global run, node and task
  id, which only Flower's own runtimes set.
* ``Run``: the type of the abstract ``Grid.run`` and ``Grid.set_run``.
* ``message_id``: ``Metadata`` has no public setter; Flower's own grids write the same attribute.
* ``_data``, ``_metadata``, ``_content``, ``_error``: where records and messages keep what they hold. Copies are made
  of these, since constructors check everything again, which takes longer than a small client trains.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from flwr.app import Message, RecordDict
from flwr.supercore.run import Run as FlowerRun
from flwr.supercore.task_identity import TaskIdentity

SERVER_NODE_ID = 1

CLIENT_APP_RAISED = 2
NODE_UNAVAILABLE = 5
"""Flower's error codes, stable values of a private enumeration."""


def flower_run(run_id: int) -> FlowerRun:
    """An empty run description."""
    return FlowerRun.create_empty(run_id)


def set_message_id(message: Message, message_id: str) -> None:
    """Give a message the id that replies refer to."""
    message.metadata.__dict__["_message_id"] = message_id


def with_content(message: Message, content: RecordDict) -> Message:
    """The same message, as the receiver gets it, with its own copy of the content."""
    copy = Message.__new__(Message)  # its constructor would make up metadata of a reply, for every message anew
    copy.__dict__.update(_metadata=message.metadata, _content=content, _error=None)
    return copy


def copy_records(records: RecordDict) -> RecordDict:
    """New containers around the same payloads, which nobody writes to."""
    copy = records.copy()
    copy.__dict__["_data"] = {key: record.copy() for key, record in records.items()}  # types are right already
    return copy


@contextmanager
def task_identity(run_id: int) -> Iterator[None]:
    """Let messages be made in this process; what was set before is restored."""
    before = (TaskIdentity._run_id, TaskIdentity._node_id, TaskIdentity._task_id)
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = run_id, SERVER_NODE_ID, 1
    try:
        yield
    finally:
        TaskIdentity._run_id, TaskIdentity._node_id, TaskIdentity._task_id = before

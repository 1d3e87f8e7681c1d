"""The only module that uses Flower internals; a contract test checks them against the installed version.

A custom `Grid` requires the first three:

* ``TaskIdentity``: ``Message(content, dst_node_id, message_type)`` reads the process-wide run, node and task ids, which
  only Flower's own runtimes set.
* ``Run``: the type of the abstract ``Grid.run`` and ``Grid.set_run``.
* ``message_id``: ``Metadata`` has no public setter; Flower's own grids set the same attribute.
* ``_data``, ``_metadata``, ``_content``, ``_error``: storage of records and messages. They are copied directly, because
  the validation in the constructors takes longer than training a small client.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from flwr.app import Message, RecordDict
from flwr.supercore.run import Run as FlowerRun
from flwr.supercore.task_identity import TaskIdentity

SERVER_NODE_ID = 1

NODE_UNAVAILABLE = 5
"""Flower's error code; the enumeration is private, its values are stable."""


def flower_run(run_id: int) -> FlowerRun:
    """Create an empty run description."""
    return FlowerRun.create_empty(run_id)


def set_message_id(message: Message, message_id: str) -> None:
    """Set the message id to which replies refer."""
    message.metadata.__dict__["_message_id"] = message_id


def with_content(message: Message, content: RecordDict) -> Message:
    """Copy of a message with other content, as delivered to its receiver."""
    copy = Message.__new__(Message)  # the constructor would create new metadata of a reply
    copy.__dict__.update(_metadata=message.metadata, _content=content, _error=None)
    return copy


def copy_records(records: RecordDict) -> RecordDict:
    """Copy the containers; the payloads are shared and never modified."""
    copy = records.copy()
    copy.__dict__["_data"] = {key: record.copy() for key, record in records.items()}  # types are already validated
    return copy


@contextmanager
def task_identity(run_id: int) -> Iterator[None]:
    """Allow the creation of messages in this process; the previous identity is restored afterwards."""
    previous = (TaskIdentity._run_id, TaskIdentity._node_id, TaskIdentity._task_id)
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = run_id, SERVER_NODE_ID, 1
    try:
        yield
    finally:
        TaskIdentity._run_id, TaskIdentity._node_id, TaskIdentity._task_id = previous

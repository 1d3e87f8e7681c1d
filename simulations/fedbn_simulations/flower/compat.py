"""The only module that uses Flower internals; a contract test checks them against the installed version.

A custom `Grid` requires the first three:

* ``TaskIdentity``: ``Message(content, dst_node_id, message_type)`` reads the process-wide run, node and task ids, which
  only Flower's own runtimes set.
* ``Run``: the type of the abstract ``Grid.run`` and ``Grid.set_run``.
* ``message_id``: ``Metadata`` has no public setter; Flower's own grids set the same attribute.
* ``_data``, ``_metadata``, ``_content``, ``_error``: storage of records and messages. They are copied directly, because
  the validation in the constructors takes longer than training a small client.

``flatten_dict``, ``load_app`` and ``ExitCode`` give runs of any app the run-config, imports and exit codes of Flower.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from flwr.app import Message, RecordDict
from flwr.supercore.exit import ExitCode
from flwr.supercore.exit.exit_code import EXIT_CODE_HELP
from flwr.supercore.object_ref import load_app
from flwr.supercore.run import Run as FlowerRun
from flwr.supercore.task_identity import TaskIdentity

SERVER_NODE_ID = 1

CLIENT_APP_RAISED = 2
NODE_UNAVAILABLE = 5
"""Flower's error codes; the enumeration is private, its values are stable."""


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


def flatten_config(config: dict[str, Any]) -> dict[str, Any]:
    """A run-config with dotted names instead of tables.

    Raises:
        ValueError: a value that a run-config cannot have.
    """
    from flwr.common.config import flatten_dict  # imports requests

    return dict(flatten_dict(config))


def load_component(reference: str, directory: Path) -> Any:
    """Object of a reference ``module:name`` in a directory, which is added to the module search path.

    Raises:
        ImportError: the module cannot be imported.
        LookupError: the module does not have the name.
    """
    return load_app(reference, LookupError, directory)


def exit_after_failure(error: Exception) -> NoReturn:
    """Log the code of a failed simulation and exit, as Flower's simulation process does.

    Flower's own function would also kill this process after some seconds, whatever catches `SystemExit`.
    """
    is_import_error = isinstance(error, ImportError)
    code = ExitCode.COMMON_APP_IMPORT_ERROR if is_import_error else ExitCode.SIMULATION_EXCEPTION
    logging.getLogger("flwr").error("Exit Code: %s\n%s", code, EXIT_CODE_HELP[code])
    raise SystemExit(1)

"""Mod of the ClientApp that lets no content of an exception leave the client.

Flower replies to the server with the text of an exception. That text can hold private data, such as a cell of a file.
This mod replies with the class name and a code instead. The details go to the node's own log: the file that
``log="PATH"`` in the node config or the environment variable ``FEDBN_CLIENT_LOG`` names, or else standard error.
"""

from __future__ import annotations

from typing import cast

from flwr.app import ConfigRecord, Context, Error, Message
from flwr.clientapp.typing import ClientAppCallable

from fedbn.federation.failures import CLASS_NAME, CODES, Report, report

FLOWER_CODES = {
    1: "the ClientApp could not be loaded; the log of the node has the details",
    2: "the ClientApp raised an exception; the log of the node has the details",
    3: "the message is not available or has expired",
    4: "the reply is not available or has expired",
    5: "the node is not available",
    7: "the app could not be verified",
    8: "the ClientApp crashed or was killed; the log of the node has the details",
}
"""Meaning of Flower's own error codes, whose texts are not shown, because some contain the text of an exception."""


def report_errors(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
    """Reply with class name and code of an exception, and restore the client state."""
    before = {name: record.copy() for name, record in context.state.items()}
    try:
        return call_next(message, context)
    except Exception as error:
        context.state.clear()
        context.state.update(before)
        path = context.node_config.get("log")
        hidden = report(_describe(message, context), error, str(path) if path else None)
        return Message(Error(hidden.code, hidden.name), reply_to=message)


def _describe(message: Message, context: Context) -> str:
    """Kind and round of a message and the node that handles it."""
    config = message.content.get("config") if message.has_content() else None
    number = cast(ConfigRecord, config).get("round") if isinstance(config, ConfigRecord) else None
    round_text = "" if number is None else f", round {number!r}"
    return (
        f"{message.metadata.message_type}{round_text}, partition {context.node_config.get('partition-id')!r}, "
        f"node {context.node_id}, run {context.run_id}"
    )


def describe_error(error: Error) -> str:
    """Text of an error reply for the server, which contains no text of the client except a class name.

    >>> describe_error(Error(105, "ZeroDivisionError"))
    'ZeroDivisionError (code 105: invalid arithmetic); the log of this client has the details'
    >>> describe_error(Error(2, "ValueError: cell 7 of patient 3"))
    'error 2: the ClientApp raised an exception; the log of the node has the details'
    """
    if error.code not in CODES:
        return f"error {error.code}: {FLOWER_CODES.get(error.code, 'unknown')}"
    name = error.reason or ""
    return str(Report(name if CLASS_NAME.fullmatch(name) else "Exception", error.code))

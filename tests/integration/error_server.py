"""A ServerApp that lets nodes raise exceptions and writes what it receives to a file."""

from __future__ import annotations

import json
import time
from pathlib import Path

from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import ServerApp

from tests.integration.error_client import ACTION

REPLIES = "replies.json"
NAMES = "names.json"

app = ServerApp()


@app.main()
def main(grid, context):
    directory = Path(context.run_config["out"]).parent
    names = json.loads((directory / NAMES).read_text())
    while not (nodes := list(grid.get_node_ids())):
        time.sleep(0.1)
    sent = {}
    for i, name in enumerate(names):
        content = RecordDict({"config": ConfigRecord({"name": name})})
        message = Message(content, nodes[i % len(nodes)], f"query.{ACTION}")
        (sent[name],) = grid.push_messages([message])
    found = {}
    while sent:
        for reply in grid.pull_messages(list(sent.values())):
            name = next(name for name, id in sent.items() if id == reply.metadata.reply_to_message_id)
            del sent[name]
            found[name] = (reply.error.code, reply.error.reason) if reply.has_error() else repr(reply.content)
        time.sleep(0.2)
    (directory / REPLIES).write_text(json.dumps(found))

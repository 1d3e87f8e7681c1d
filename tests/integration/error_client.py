"""The ClientApp with one more handler, which raises the exception that the message names."""

from __future__ import annotations

from fedbn_clients.app import app
from tests.exceptions import ERRORS

ACTION = "raise_error"


@app.query(ACTION)
def raise_error(message, context):
    name = message.content["config"]["name"]
    context.state["changed"] = message.content["config"]
    if name == "exit":
        raise SystemExit(ERRORS["ValueError"])
    raise ERRORS[name]

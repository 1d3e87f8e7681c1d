"""The contract with the parts of Flower that are not public; fails on a version that changed them."""

from __future__ import annotations

import pytest
from flwr.app import ConfigRecord, Error, Message, RecordDict
from flwr.common.constant import SUPERLINK_NODE_ID, ErrorCode
from flwr.serverapp import Grid

from simulations.flower import compat as flower_compat


def test_messages_need_an_identity_and_get_one():
    with flower_compat.task_identity(5):
        message = Message(RecordDict(), 3, "train")
    assert (message.metadata.run_id, message.metadata.src_node_id, message.metadata.dst_node_id) == (5, 1, 3)
    with pytest.raises(RuntimeError, match="not set"):
        Message(RecordDict(), 3, "train")


def test_constants_are_flowers():
    assert flower_compat.SERVER_NODE_ID == SUPERLINK_NODE_ID
    assert flower_compat.NODE_UNAVAILABLE == ErrorCode.NODE_UNAVAILABLE
    assert flower_compat.CLIENT_APP_RAISED == ErrorCode.CLIENT_APP_RAISED_EXCEPTION


def test_ids_contents_and_runs():
    with flower_compat.task_identity(5):
        message = Message(RecordDict({"a": ConfigRecord({"x": 1})}), 3, "train")
    flower_compat.set_message_id(message, "m-1")
    copy = flower_compat.with_content(message, RecordDict())
    assert copy.metadata.message_id == "m-1"
    assert copy.metadata.dst_node_id == 3
    assert len(copy.content) == 0
    assert len(message.content) == 1
    reply = Message(Error(1, "x"), reply_to=copy)
    assert reply.metadata.reply_to_message_id == "m-1"
    assert flower_compat.flower_run(9).run_id == 9


def test_copied_records_do_not_share_containers():
    records = RecordDict({"a": ConfigRecord({"x": 1})})
    copy = flower_compat.copy_records(records)
    assert copy == records
    copy["a"]["x"] = 2
    copy["b"] = ConfigRecord()
    assert records == RecordDict({"a": ConfigRecord({"x": 1})})
    with pytest.raises(TypeError):
        copy["c"] = 3


def test_a_delivered_message_is_like_any_other():
    with flower_compat.task_identity(5):
        message = Message(RecordDict(), 3, "train")
    copy = flower_compat.with_content(message, RecordDict({"a": ConfigRecord()}))
    assert vars(copy).keys() == vars(message).keys()
    assert copy.has_content()
    assert not copy.has_error()


def test_the_grid_is_abstract_in_what_we_implement():
    assert {
        "create_message",
        "get_node_ids",
        "pull_messages",
        "push_messages",
        "run",
        "send_and_receive",
        "set_run",
    } == set(Grid.__abstractmethods__)

"""Contract with private parts of Flower; fails for versions that change them."""

from __future__ import annotations

import pytest
from flwr.app import ConfigRecord, Error, Message, RecordDict
from flwr.common.constant import SUPERLINK_NODE_ID, ErrorCode
from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import Grid
from flwr.superlink.grid.http_grid import HttpGrid

from fedbn_clients.errors import FLOWER_CODES
from fedbn_simulations.flower import compat as flower_compat


def message_of(content):
    with flower_compat.task_identity(5):
        return Message(content, 3, "train")


def test_task_identity_allows_message_creation():
    message = message_of(RecordDict())
    assert (message.metadata.run_id, message.metadata.src_node_id, message.metadata.dst_node_id) == (5, 1, 3)
    with pytest.raises(RuntimeError, match="not set"):
        Message(RecordDict(), 3, "train")


def test_constants_match_flower():
    assert flower_compat.SERVER_NODE_ID == SUPERLINK_NODE_ID
    assert flower_compat.CLIENT_APP_RAISED == ErrorCode.CLIENT_APP_RAISED_EXCEPTION
    assert flower_compat.NODE_UNAVAILABLE == ErrorCode.NODE_UNAVAILABLE
    assert FLOWER_CODES.keys() == {v for v in vars(ErrorCode).values() if isinstance(v, int)} - {0, 6}


def test_set_message_id_with_content_and_flower_run():
    message = message_of(RecordDict({"a": ConfigRecord({"x": 1})}))
    flower_compat.set_message_id(message, "m-1")
    copy = flower_compat.with_content(message, RecordDict())
    assert copy.metadata.message_id == "m-1"
    assert copy.metadata.dst_node_id == 3
    assert len(copy.content) == 0
    assert len(message.content) == 1
    reply = Message(Error(1, "x"), reply_to=copy)
    assert reply.metadata.reply_to_message_id == "m-1"
    assert flower_compat.flower_run(9).run_id == 9


def test_copy_records_copies_containers():
    records = RecordDict({"a": ConfigRecord({"x": 1})})
    copy = flower_compat.copy_records(records)
    assert copy == records
    copy["a"]["x"] = 2
    copy["b"] = ConfigRecord()
    assert records == RecordDict({"a": ConfigRecord({"x": 1})})
    with pytest.raises(TypeError):
        copy["c"] = 3


def test_with_content_creates_complete_message():
    message = message_of(RecordDict())
    copy = flower_compat.with_content(message, RecordDict({"a": ConfigRecord()}))
    assert vars(copy).keys() == vars(message).keys()
    assert copy.has_content()
    assert not copy.has_error()


def test_grid_has_expected_abstract_methods():
    methods = {"create_message", "get_node_ids", "pull_messages", "push_messages", "run", "send_and_receive", "set_run"}
    assert methods == set(Grid.__abstractmethods__)


def test_grid_shows_public_keys_of_nodes():
    assert "public_key" in NodeInfo.DESCRIPTOR.fields_by_name
    assert all(callable(grid.get_nodes) for grid in (Grid, HttpGrid))

from __future__ import annotations

import pytest
import torch
from flwr.app import ConfigRecord, Context, Message, RecordDict

from fedbn_clients import persistence
from fedbn_clients.persistence import MAX_ROUNDS, checksum, client_state_on_disk, replace_file
from fedbn_clients.records import arrays, tensors
from fedbn_simulations.flower.compat import task_identity


def call(folder, kind, trained, round, value=None):
    """Send a message to a node that lost its memory.

    Returns the client state that the handler finds; the handler replaces it by ``value``.
    """
    context = Context(1, 1, {"partition-id": 3, "state-dir": str(folder)}, RecordDict(), {})
    context.state["client-state-9"] = arrays({"w": torch.full((2,), 99.0)})
    with task_identity(1):
        message = Message(RecordDict({"config": ConfigRecord({"trained": trained, "round": round})}), 1, kind)
    found = {}

    def handler(message, context):
        found.update({name: tensors(record)["w"].tolist() for name, record in context.state.array_records.items()})
        if value is not None:
            context.state["client-state-3"] = arrays({"w": torch.full((2,), float(value))})
        return message

    client_state_on_disk(message, context, handler)
    return found


def rounds_on_disk(folder):
    (file,) = folder.iterdir()
    owner = {"version": persistence.FORMAT_VERSION, "run": 1, "user": 3}
    return {number: float(r["client-state-3"]["w"][0]) for number, r in persistence.read_states(file, owner).items()}


def test_client_state_on_disk_keeps_the_last_rounds(tmp_path):
    for number in range(1, 6):
        found = call(tmp_path, "train", number - 1, number, value=10 * number)
        assert found == ({"client-state-3": [10 * (number - 1)] * 2} if number > 1 else {})
    assert rounds_on_disk(tmp_path) == {3: 30, 4: 40, 5: 50}
    assert MAX_ROUNDS == 3


def test_client_state_on_disk_discards_rounds_that_were_not_aggregated(tmp_path):
    for number in (1, 2, 3):
        call(tmp_path, "train", number - 1, number, value=10 * number)
    assert call(tmp_path, "train", 1, 2, value=7) == {"client-state-3": [10, 10]}
    assert rounds_on_disk(tmp_path) == {1: 10, 2: 7}
    assert call(tmp_path, "evaluate", 2, 2, value=8) == {"client-state-3": [7, 7]}
    assert rounds_on_disk(tmp_path) == {1: 10, 2: 7}, "only training changes the file"
    assert call(tmp_path, "train", 0, 1, value=5) == {}


def test_client_state_on_disk_detects_any_flipped_bit(tmp_path):
    call(tmp_path, "train", 0, 1, value=1)
    (file,) = tmp_path.iterdir()
    data = file.read_bytes()
    for byte in range(len(data)):
        file.write_bytes(data[:byte] + bytes([data[byte] ^ 1 << byte % 8]) + data[byte + 1 :])
        assert rounds_on_disk(tmp_path) in ({}, {1: 1}), byte
    for byte in range(1, 9):
        file.write_bytes(data[:-byte] + bytes([data[-byte] ^ 1]) + data[len(data) - byte + 1 :])
        assert rounds_on_disk(tmp_path) == {}, "a value has changed"


@pytest.mark.parametrize(
    "other", [{"w": torch.tensor([1.0, 2.0])}, {"w": torch.tensor([2.0, 1.0]), "v": torch.zeros(0)}, {}]
)
def test_checksum_differs_for_other_tensors(other):
    state = {"v": torch.tensor([3.0]), "w": torch.tensor([2.0, 1.0])}
    assert checksum("a", state) == checksum("a", dict(reversed(state.items())))
    assert checksum("a", state) != checksum("a", other)
    assert checksum("a", state) != checksum("b", state)


def test_replace_file_keeps_old_content_as_backup(tmp_path):
    path, backup = tmp_path / "folder" / "file", tmp_path / "folder" / "before"
    replace_file(path, b"one", backup)
    assert not backup.exists()
    replace_file(path, b"two", backup)
    assert (path.read_bytes(), backup.read_bytes()) == (b"two", b"one")
    replace_file(path, b"three")
    assert (path.read_bytes(), backup.read_bytes()) == (b"three", b"one")
    assert sorted(p.name for p in path.parent.iterdir()) == ["before", "file"]


def test_replace_file_removes_temporary_file_after_failure(tmp_path):
    (tmp_path / "file").mkdir()
    (tmp_path / "file" / "content").touch()
    with pytest.raises(OSError, match="file"):
        replace_file(tmp_path / "file", b"one")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]

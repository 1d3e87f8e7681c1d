"""What a client keeps, on its own disk: Flower's SuperNode has it in memory only, and loses it with any restart.

A SuperNode started with ``state-dir="PATH"`` in its node config, or with `STATES` in its environment, writes what its
user keeps after every round that it trained, under the number of that round, beside that of its rounds before. The
server says with every message which round of the user's it counted last, and the user goes on from there: a round that
was trained but never counted, since the node or the server was killed, is as if it had not been. A file is bound to one
user and one run; a run whose server writes checkpoints (``out``) stays the same run when it is submitted again.
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from contextlib import suppress
from pathlib import Path
from typing import cast

import torch
from flwr.app import ConfigRecord, Context, Message
from flwr.clientapp.typing import ClientAppCallable
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from clients.config import run_from_config
from clients.records import arrays, tensors
from fedbn.nn.roles import State

VERSION = 3

STATES = "FEDBN_STATES"
"""Environment variable that names the directory where a simulation has no node config of its own to do it."""

ROUNDS = 3
"""Rounds on disk: one under way, and those of the server's two checkpoints."""

Records = dict[str, State]


def client_state_on_disk(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
    """A mod of the ClientApp: what happens around each message.

    Raises:
        OSError: the directory cannot be written; the message is answered with an error.
    """
    folder = context.node_config.get("state-dir") or os.environ.get(STATES)
    config = message.content.get("config")
    if not folder or not isinstance(config, ConfigRecord) or "trained" not in config:
        return call_next(message, context)
    owner, counted = _owner(context), cast(int, config["trained"])
    path = Path(str(folder)) / f"run-{owner['run']}-user-{owner['user']}.safetensors"
    rounds = _read(path, owner)
    for name in list(context.state):
        del context.state[name]
    for name, state in rounds.get(counted, {}).items():
        context.state[name] = arrays(state)
    reply = call_next(message, context)
    if message.metadata.message_type == "train":
        past = {number: records for number, records in rounds.items() if number <= counted}
        past[cast(int, config["round"])] = {n: tensors(r) for n, r in context.state.array_records.items()}
        _write(path, owner, dict(sorted(past.items())[-ROUNDS:]))
    return reply


def _owner(context: Context) -> dict[str, int | str]:
    config = context.run_config
    run: int | str = context.run_id
    if config.get("out"):
        run = hashlib.sha256(f"{run_from_config(config).to_json()} {config['out']}".encode()).hexdigest()[:16]
    return {"version": VERSION, "run": run, "user": int(context.node_config["partition-id"])}


def _write(path: Path, owner: dict[str, int | str], rounds: dict[int, Records]) -> None:
    flat = {
        f"{number}/{name}/{key}": value.cpu().contiguous().clone()
        for number, records in rounds.items()
        for name, state in records.items()
        for key, value in state.items()
    }
    names = json.dumps(owner | {"rounds": {number: list(records) for number, records in rounds.items()}})
    replace_file(path, save(flat, metadata={"client_state": names, "crc32": str(checksum(names, flat))}))


def _read(path: Path, owner: dict[str, int | str]) -> dict[int, Records]:
    """What is on disk for this owner; nothing if it is somebody else's, damaged or not there: then it is lost."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            flat = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
        header = json.loads(metadata["client_state"])
        sound = metadata["crc32"] == str(checksum(metadata["client_state"], flat))
        rounds = header["rounds"] if sound and owner.items() <= header.items() else {}
    except (OSError, SafetensorError, KeyError, json.JSONDecodeError):
        return {}
    return {
        int(number): {name: _under(f"{number}/{name}/", flat) for name in names} for number, names in rounds.items()
    }


def _under(prefix: str, flat: State) -> State:
    return {k.removeprefix(prefix): v for k, v in flat.items() if k.startswith(prefix)}


def checksum(text: str, tensors: State) -> int:
    """CRC-32 of a text and of tensors with their names: safetensors notices no changed bit of a value.

    >>> checksum("", {"w": torch.zeros(2)}) == checksum("", {"v": torch.zeros(2)})
    False
    """
    found = zlib.crc32(text.encode())
    for name in sorted(tensors):
        values = tensors[name].reshape(-1).view(torch.uint8).numpy().data
        found = zlib.crc32(values, zlib.crc32(name.encode(), found))
    return found


def replace_file(path: Path, data: bytes, keep: Path | None = None) -> None:
    """Write beside, sync, rename: a kill at any moment leaves the old file or the new one.

    Args:
        path: to be written.
        data: what it shall hold.
        keep: where the file that was there before goes; None: it is replaced.

    Raises:
        OSError: the place cannot be written; what was there before still is.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if keep is not None and path.exists():
            path.replace(keep)
        temporary.replace(path)
    except OSError:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)  # part of a file only fills the disk further
        raise

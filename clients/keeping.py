"""What a client keeps, on its own disk: Flower's SuperNode has it in memory only, and loses it with any restart.

A SuperNode started with ``state-dir="PATH"`` in its node config writes the entries of its user after every message
that changed them, and reads them again when its memory is empty. A file is bound to one run and one user.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import torch
from flwr.app import Context
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from clients.records import arrays, tensors
from fedbn.roles import State

VERSION = 1


def kept_on_disk(context: Context) -> Iterator[None]:
    """A ClientApp's lifespan: what happens around each message.

    Raises:
        OSError: the directory cannot be written; the message is answered with an error.
    """
    folder = context.node_config.get("state-dir")
    if not folder:
        yield
        return
    path = Path(str(folder)) / f"run-{context.run_id}-user-{context.node_config['partition-id']}.safetensors"
    if not context.state:
        for name, state in _read(path, _owner(context)).items():
            context.state[name] = arrays(state)
    before = _states(context)
    yield
    if not _same(before, after := _states(context)):
        _write(path, _owner(context), after)


def _owner(context: Context) -> dict[str, int]:
    return {"version": VERSION, "run": context.run_id, "user": int(context.node_config["partition-id"])}


def _states(context: Context) -> dict[str, State]:
    return {name: tensors(record) for name, record in context.state.array_records.items()}


def _same(a: dict[str, State], b: dict[str, State]) -> bool:
    return a.keys() == b.keys() and all(
        a[n].keys() == b[n].keys() and all(torch.equal(v, b[n][k]) for k, v in a[n].items()) for n in a
    )


def _write(path: Path, owner: dict[str, int], states: dict[str, State]) -> None:
    flat = {f"{name}/{k}": v.cpu().contiguous().clone() for name, state in states.items() for k, v in state.items()}
    names = json.dumps(owner | {"records": list(states)})
    replace_file(path, save(flat, metadata={"kept": names, "crc32": str(checksum(names, flat))}))


def _read(path: Path, owner: dict[str, int]) -> dict[str, State]:
    """What is on disk for this owner; nothing if it is somebody else's, damaged or not there: then it is lost."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            flat = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
        header = json.loads(metadata["kept"])
        sound = metadata["crc32"] == str(checksum(metadata["kept"], flat))
        names = header["records"] if sound and owner.items() <= header.items() else []
    except (OSError, SafetensorError, KeyError, json.JSONDecodeError):
        return {}
    return {n: {k.removeprefix(f"{n}/"): v for k, v in flat.items() if k.startswith(f"{n}/")} for n in names}


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

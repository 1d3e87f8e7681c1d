"""Client state on the client's disk: Flower's SuperNode holds it only in memory and loses it on restart.

A SuperNode with ``state-dir="PATH"`` in its node config, or with `STATE_DIR_VARIABLE` in its environment, writes the
client state after every round in which it trained, and keeps the states of earlier rounds. Each message of the server
names the last round of this user that the server aggregated, and the client continues from the state of that round.
A round that was trained but never aggregated, because the node or the server was killed, has no effect. A file belongs
to one user and one run; a run whose server writes checkpoints (``out``) remains the same run when it is resubmitted.
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from pathlib import Path
from typing import cast

import torch
from flwr.app import ConfigRecord, Context, Message
from flwr.clientapp.typing import ClientAppCallable
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from fedbn.files import replace_file
from fedbn.nn.roles import State, with_prefix
from fedbn_clients.config import run_from_config
from fedbn_clients.records import arrays, tensors

FORMAT_VERSION = 3

STATE_DIR_VARIABLE = "FEDBN_STATES"
"""Environment variable for the state directory, for simulations, which have no node config."""

MAX_ROUNDS = 3
"""Rounds on disk: the current one and those of the server's two checkpoints."""

Records = dict[str, State]


def client_state_on_disk(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
    """Mod of the ClientApp that loads the client state before a message and stores it after training.

    Raises:
        OSError: the directory cannot be written; the reply is an error.
    """
    folder = state_folder(context)
    config = message.content.get("config")
    if folder is None or not isinstance(config, ConfigRecord) or "trained" not in config:
        return call_next(message, context)
    owner, last_round = _owner(context), cast(int, config["trained"])
    path = folder / f"run-{owner['run']}-user-{owner['user']}.safetensors"
    rounds = read_states(path, owner)
    for name in list(context.state):
        del context.state[name]
    for name, state in rounds.get(last_round, {}).items():
        context.state[name] = arrays(state)
    reply = call_next(message, context)
    if message.metadata.message_type == "train":
        past = {number: records for number, records in rounds.items() if number <= last_round}
        past[cast(int, config["round"])] = {n: tensors(r) for n, r in context.state.array_records.items()}
        write_states(path, owner, dict(sorted(past.items())[-MAX_ROUNDS:]))
    return reply


def state_folder(context: Context) -> Path | None:
    """The directory of client states of this node; None if it stores none."""
    folder = context.node_config.get("state-dir") or os.environ.get(STATE_DIR_VARIABLE)
    return Path(str(folder)) if folder else None


def _owner(context: Context) -> dict[str, int | str]:
    config = context.run_config
    run: int | str = context.run_id
    if config.get("out"):
        run = hashlib.sha256(f"{run_from_config(config).to_json()} {config['out']}".encode()).hexdigest()[:16]
    return {"version": FORMAT_VERSION, "run": run, "user": int(context.node_config["partition-id"])}


def write_states(path: Path, owner: dict[str, int | str], rounds: dict[int, Records]) -> None:
    """Write the states of an owner, by round, in place of those in the file."""
    flat = {
        f"{number}/{name}/{key}": value.cpu().contiguous().clone()
        for number, records in rounds.items()
        for name, state in records.items()
        for key, value in state.items()
    }
    names = json.dumps(owner | {"rounds": {number: list(records) for number, records in rounds.items()}})
    replace_file(path, save(flat, metadata={"client_state": names, "crc32": str(checksum(names, flat))}))


def read_states(path: Path, owner: dict[str, int | str]) -> dict[int, Records]:
    """Read the states of this owner; empty if the file is missing, damaged or belongs to another owner."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            flat = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
        header = json.loads(metadata["client_state"])
        valid = metadata["crc32"] == str(checksum(metadata["client_state"], flat))
        rounds = header["rounds"] if valid and owner.items() <= header.items() else {}
    except (OSError, SafetensorError, KeyError, json.JSONDecodeError):
        return {}
    return {
        int(number): {name: with_prefix(flat, f"{number}/{name}/") for name in names}
        for number, names in rounds.items()
    }


def checksum(text: str, tensors: State) -> int:
    """CRC-32 of a text and of named tensors, because safetensors does not detect changed values.

    >>> checksum("", {"w": torch.zeros(2)}) == checksum("", {"v": torch.zeros(2)})
    False
    """
    crc = zlib.crc32(text.encode())
    for name in sorted(tensors):
        values = tensors[name].reshape(-1).view(torch.uint8).numpy().data
        crc = zlib.crc32(values, zlib.crc32(name.encode(), crc))
    return crc

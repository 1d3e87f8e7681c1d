"""What a grid's nodes keep, in memory-mapped files as soon as it would take too much memory.

A federation of many users keeps a state of each, a hundred thousand of them with a megabyte, say. The operating system
then writes out what is not in use, and reads it again when its user is next asked; values and bits stay the same.
"""

from __future__ import annotations

import logging
import math
import os
import shutil
import sys
import tempfile
from pathlib import Path

import torch
from flwr.app import RecordDict
from torch import Tensor

from clients.serialization import LazyArrayRecord
from fedbn.errors import UserError
from fedbn.nn.roles import State

log = logging.getLogger(__name__)

INFO = Path("/proc/meminfo")

SHARE = 0.5
"""Of the memory that is available, what all nodes' states may take."""

ALIGNED = 64
"""Bytes at whose multiples a tensor begins."""

FILE = 2**26
"""Bytes of a file, unless a single state is larger: systems allow some ten thousand mappings a process."""


class ClientStates:
    """Where the states of a grid's nodes are.

    Attributes:
        nodes: how many there are.
        on_disk: whether states are in files; None until the first is known.
    """

    def __init__(self, nodes: int) -> None:
        """For so many nodes."""
        self.nodes = nodes
        self.on_disk: bool | None = None
        self._place: dict[tuple[int, str], Tensor] = {}
        self._free: dict[int, list[Tensor]] = {}

    def keep(self, node: int, records: RecordDict) -> None:
        """Move a node's tensors to a file, if that is where states are to be.

        Args:
            node: whose.
            records: its context's state; tensors held by reference become those of the file.

        Raises:
            UserError: there is no room on the disk either.
        """
        if self.on_disk is False:
            return
        held = {
            name: record.state
            for name, record in records.items()
            if isinstance(record, LazyArrayRecord) and record.state
        }
        if self.on_disk is None and held:
            self._decide(sum(size(state) for state in held.values()))
        for name, state in held.items():
            if self.on_disk and all(value.device.type == "cpu" for value in state.values()):
                records[name] = LazyArrayRecord(self._written((node, name), state))

    def _decide(self, each: int) -> None:
        needed, free = each * self.nodes, available()
        self.on_disk = needed > SHARE * free
        if self.on_disk:
            where = tempfile.gettempdir()
            text = f"what {self.nodes} clients keep, {needed / 1e9:.3g} GB"
            if needed > (room := shutil.disk_usage(where).free):
                raise UserError(f"{where} has no room for {text}, but {room / 1e9:.3g}: name a larger place in TMPDIR")
            log.warning(f"{text}, is more than {SHARE:.0%} of the memory left: it goes to files in {where}")

    def _written(self, key: tuple[int, str], state: State) -> State:
        """The same values in a file. A client may keep what it had under another name: so never over what it had."""
        before = self._place.get(key)
        if before is not None and all(_within(value, before) for value in state.values()):
            return state
        free = self._free.setdefault(size(state), [])
        if not free:
            free += _mapped(size(state), self.nodes)
        place = free.pop()
        at, out = 0, {}
        for name, value in state.items():
            count = value.numel() * value.element_size()
            out[name] = place[at : at + count].view(value.dtype).view(value.shape)
            out[name].copy_(value.detach())
            at += _aligned(count)
        self._place[key] = place
        if before is not None:
            self._free[len(before)].append(before)
        return out


def _within(value: Tensor, place: Tensor) -> bool:
    return 0 <= value.data_ptr() - place.data_ptr() < len(place)


def size(state: State) -> int:
    """Bytes of a state's file."""
    return sum(_aligned(value.numel() * value.element_size()) for value in state.values())


def _aligned(count: int) -> int:
    return math.ceil(count / ALIGNED) * ALIGNED


def _mapped(count: int, most: int) -> list[Tensor]:
    """Places of ``count`` bytes, at most so many, in a file without a name: it is gone with the process."""
    places = min(most, max(1, FILE // count))
    number, name = tempfile.mkstemp(prefix="fedbn-clients-")
    try:
        if hasattr(os, "posix_fallocate"):  # without room for all of it, writing to the mapping would end the process
            os.posix_fallocate(number, 0, places * count)
        else:
            os.truncate(name, places * count)
        return [*torch.from_file(name, shared=True, size=places * count, dtype=torch.uint8).split(count)]
    except OSError as error:
        where = tempfile.gettempdir()
        raise UserError(f"{where}: no room for what clients keep ({error}): name a larger one in TMPDIR") from None
    finally:
        os.close(number)
        os.unlink(name)


def available() -> int:
    """Bytes of memory that can still be had; all that the machine has, where the system does not say.

    Where it says neither, states stay in memory.
    """
    if INFO.exists():
        return 1024 * int(INFO.read_text(encoding="utf-8").split("MemAvailable:")[1].split()[0])
    if "SC_PHYS_PAGES" in getattr(os, "sysconf_names", ()):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return sys.maxsize

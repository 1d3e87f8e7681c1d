"""Client states of a grid's nodes, moved to memory-mapped files if they need too much memory.

A federation keeps one state per user, for example a megabyte for each of a hundred thousand users. The operating system
writes unused states to disk and reads them back when the user is selected again; the bits do not change.
"""

from __future__ import annotations

import logging
import math
import os
import shutil
import sys
import tempfile
from functools import cached_property
from pathlib import Path

import torch
from flwr.app import RecordDict
from torch import Tensor

from fedbn.errors import UserError
from fedbn.nn.roles import State
from fedbn_clients.serialization import LazyArrayRecord

log = logging.getLogger(__name__)

MEMINFO = Path("/proc/meminfo")

MAX_MEMORY_SHARE = 0.5
"""Maximum share of the available memory for the states of all nodes."""

ALIGNMENT = 64
"""Alignment of tensors in a file, in bytes."""

FILE_BYTES = 2**26
"""Bytes per file, unless one state is larger; processes are limited to some ten thousand mappings."""


class ClientStates:
    """Storage for the client states of a grid's nodes.

    Attributes:
        nodes: number of nodes.
        on_disk: whether states are stored in files; None until the size of a state is known.
    """

    def __init__(self, nodes: int) -> None:
        """Create the storage for ``nodes`` nodes."""
        self.nodes = nodes
        self.on_disk: bool | None = None
        self._blocks: dict[tuple[int, str], Tensor] = {}
        self._free: dict[int, list[Tensor]] = {}

    def store(self, node: int, records: RecordDict) -> None:
        """Move the tensors of a node to a file if states are stored on disk.

        Args:
            node: id of the node.
            records: state of its context; tensors held by reference are replaced by those of the file.

        Raises:
            UserError: the disk does not have enough space.
        """
        if self.on_disk is False:
            return
        by_reference = {
            name: record.state
            for name, record in records.items()
            if isinstance(record, LazyArrayRecord) and record.state
        }
        if self.on_disk is None and by_reference:
            self._choose_storage(sum(state_bytes(state) for state in by_reference.values()))
        for name, state in by_reference.items():
            if self.on_disk and all(value.device.type == "cpu" for value in state.values()):
                records[name] = LazyArrayRecord(self._write((node, name), state))

    @cached_property
    def max_bytes(self) -> float:
        """Largest state of a client with which all states stay in memory."""
        return MAX_MEMORY_SHARE * available_memory() / self.nodes

    def _choose_storage(self, bytes_per_node: int) -> None:
        needed, free = bytes_per_node * self.nodes, available_memory()
        self.on_disk = needed > MAX_MEMORY_SHARE * free
        if self.on_disk:
            directory = tempfile.gettempdir()
            text = f"the states of {self.nodes} clients need {needed / 1e9:.3g} GB"
            if needed > (space := shutil.disk_usage(directory).free):
                raise UserError(f"{text}, but {directory} has only {space / 1e9:.3g} GB: set TMPDIR to a larger disk")
            log.warning(f"{text}, more than {MAX_MEMORY_SHARE:.0%} of the available memory: using files in {directory}")

    def _write(self, key: tuple[int, str], state: State) -> State:
        """Copy a state to a file; never over the old state, which the new one can still reference."""
        previous = self._blocks.get(key)
        if previous is not None and all(_within(value, previous) for value in state.values()):
            return state
        free = self._free.setdefault(state_bytes(state), [])
        if not free:
            free += _map_file(state_bytes(state), self.nodes)
        block = free.pop()
        offset, out = 0, {}
        for name, value in state.items():
            count = value.numel() * value.element_size()
            out[name] = block[offset : offset + count].view(value.dtype).view(value.shape)
            out[name].copy_(value.detach())
            offset += _aligned(count)
        self._blocks[key] = block
        if previous is not None:
            self._free[len(previous)].append(previous)
        return out


def _within(value: Tensor, block: Tensor) -> bool:
    return 0 <= value.data_ptr() - block.data_ptr() < len(block)


def state_bytes(state: State) -> int:
    """Bytes of a state in a file."""
    return sum(_aligned(value.numel() * value.element_size()) for value in state.values())


def _aligned(count: int) -> int:
    return math.ceil(count / ALIGNMENT) * ALIGNMENT


def _map_file(count: int, max_blocks: int) -> list[Tensor]:
    """Map up to ``max_blocks`` blocks of ``count`` bytes from an unlinked file, which is deleted with the process."""
    blocks = min(max_blocks, max(1, FILE_BYTES // count))
    descriptor, name = tempfile.mkstemp(prefix="fedbn-clients-")
    try:
        if hasattr(os, "posix_fallocate"):  # without reserved space, writing to the mapping could kill the process
            os.posix_fallocate(descriptor, 0, blocks * count)
        else:
            os.truncate(name, blocks * count)
        return [*torch.from_file(name, shared=True, size=blocks * count, dtype=torch.uint8).split(count)]
    except OSError as error:
        directory = tempfile.gettempdir()
        raise UserError(f"{directory}: no space for client states ({error}): set TMPDIR to a larger disk") from None
    finally:
        os.close(descriptor)
        os.unlink(name)


def available_memory() -> int:
    """Bytes of available memory; the total memory if the system does not report it.

    If neither is known, states stay in memory.
    """
    if MEMINFO.exists():
        return 1024 * int(MEMINFO.read_text(encoding="utf-8").split("MemAvailable:")[1].split()[0])
    if "SC_PHYS_PAGES" in getattr(os, "sysconf_names", ()):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return sys.maxsize

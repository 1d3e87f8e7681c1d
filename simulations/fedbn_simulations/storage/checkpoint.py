"""Checkpoints of runs: one safetensors file per run, replaced after every round.

The file holds the tensors of the server and the clients; its header holds the learning curve, the scores and the run.
It is replaced atomically, so an interruption at any time leaves a complete round: the last one or, while its file is
written in the background, the one before.
"""

from __future__ import annotations

import json
from collections.abc import MutableMapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self

from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from fedbn.errors import UserError
from fedbn.federation.client_table import ClientTable
from fedbn.federation.metrics import Score
from fedbn.federation.run import Run
from fedbn.federation.server import ClientFailure, Outcome, RoundMetrics, Server
from fedbn.federation.traffic import Traffic
from fedbn.files import write_atomically
from fedbn.nn.roles import State, with_prefix
from fedbn_clients.persistence import checksum
from fedbn_simulations.storage.provenance import NUMERICS, check_numerics, code_digest, versions


def previous_checkpoint(path: Path) -> Path:
    """Path of the previous checkpoint."""
    return path.with_name(f"{path.name}.before")


def save_outcome(
    path: Path, run: Run, outcome: Outcome, sources: dict[str, str] | None = None, backup: Path | None = None
) -> None:
    """Write a complete or partial outcome; the old file moves to ``backup``, if given."""
    write_atomically(path, pack_outcome(run, outcome, sources), backup)


_thread = ThreadPoolExecutor(1, "checkpoints")


class CheckpointWriter:
    """Writes files in a thread, so that the next round does not wait for the disk.

    It has at most one file to write: the next one waits for it. All writers of a process share the thread, so the files
    of runs that train together are written in the order of the calls. The context ends when the last file is written.
    """

    def __init__(self) -> None:
        self._pending: Future[None] | None = None

    def write(self, path: Path, data: bytes, backup: Path | None = None) -> None:
        """Write a file, as `fedbn.files.write_atomically`, after the last one.

        Raises:
            UserError: the last file could not be written.
        """
        self.wait()
        self._pending = _thread.submit(write_atomically, path, data, backup)

    def wait(self) -> None:
        """Wait until the last file is written.

        Raises:
            UserError: it could not be written.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            self.wait()
        except UserError:
            if kind is None:
                raise


def pack_outcome(run: Run, outcome: Outcome, sources: dict[str, str] | None = None) -> bytes:
    """The content of a checkpoint with a complete or partial outcome."""
    server = outcome.server
    states = {"server": server.state, "memory": server.memory}
    if server.serving is not server.state:
        states["serving"] = server.serving
    states |= {"known": server.known, "broadcast": server.broadcast}
    states |= {f"group/{view}": entries for view, entries in server.groups.items()}
    states |= {f"sums/{text}": entries for text, entries in outcome.sums.items()}
    tables = {"client_statistics": server.client_statistics, "client_states": outcome.client_states}
    stacked = {name: table.take(list(table)) for name, table in tables.items() if isinstance(table, ClientTable)}
    for name, table in tables.items():
        if name not in stacked:
            states |= {f"{name}/{user}": entries for user, entries in table.items()}
    tensors = {f"{name}/{k}": v.detach().cpu().contiguous().clone() for name, s in states.items() for k, v in s.items()}
    # `ClientTable.take` has copied these.
    tensors |= {f"{name}/{k}": v.cpu().contiguous() for name, s in stacked.items() for k, v in s.items()}
    header = {
        "run": run.to_json(),
        "numerics": NUMERICS,
        "code": code_digest(),
        "versions": versions(),
        "sources": sources or {},
        "seconds": outcome.seconds,
        "cpu_seconds": outcome.cpu_seconds,
        "phases": outcome.phases,
        "curve": [asdict(p) for p in outcome.curve],
        "stacked": list(stacked),
        "client_states": sorted(outcome.client_states),
        "groups": list(server.groups),
        "client_statistics": list(server.client_statistics),
        "scores": {str(u): [s.as_dict() for s in scores] for u, scores in outcome.scores.items()},
        "failures": [asdict(f) for f in outcome.failures],
        "traffic": asdict(outcome.traffic),
        "trained": {str(u): round for u, round in outcome.trained.items()},
        "sums": list(outcome.sums),
        "execution": outcome.execution,
    }
    text = json.dumps(header)
    metadata = {"outcome": text, "crc32": str(checksum(text, tensors))}
    return save(tensors, metadata=metadata)


def load_outcome(path: Path, run: Run, sources: dict[str, str] | None = None) -> Outcome:
    """Read an outcome of exactly this run, computed with the current numerics on the same data.

    Raises:
        UserError: the file is unreadable, or of another run or of other numerics, versions or data.
    """
    header, tensors = _read(path)
    if header["run"] != run.to_json():
        raise UserError(f"{path} belongs to another run; delete it or choose another --out")
    check_numerics(path, header.get("numerics"))
    if changed := {k: v for k, v in header["versions"].items() if versions().get(k) != v}:
        raise UserError(
            f"{path} was written with other versions ({changed}): install those, or start again with another --out"
        )
    if sources is not None and header["sources"] != sources:
        raise UserError(
            f"{path} was written for other data (hashes differ): restore the data, or start again with another --out"
        )
    state = with_prefix(tensors, "server/")
    serving = with_prefix(tensors, "serving/")
    return Outcome(
        server=Server(
            state,
            serving or state,
            with_prefix(tensors, "memory/"),
            {v: with_prefix(tensors, f"group/{v}/") for v in header["groups"]},
            with_prefix(tensors, "known/"),
            with_prefix(tensors, "broadcast/"),
            _client_states(header, tensors, "client_statistics"),
        ),
        client_states=_client_states(header, tensors, "client_states"),
        curve=[RoundMetrics(**p) for p in header["curve"]],
        scores={int(u): [Score.from_dict(s) for s in scores] for u, scores in header["scores"].items()},
        seconds=header["seconds"],
        cpu_seconds=header["cpu_seconds"],
        phases=header.get("phases", {}),
        failures=[ClientFailure(**f) for f in header["failures"]],
        traffic=Traffic(**header["traffic"]),
        trained={int(u): round for u, round in header["trained"].items()},
        sums={text: with_prefix(tensors, f"sums/{text}/") for text in header.get("sums", ())},
        execution=header.get("execution", {}),
    )


def _client_states(header: dict[str, Any], tensors: State, name: str) -> MutableMapping[int, State]:
    """States of the clients by user, which are stored with one tensor per entry or one by one."""
    users = header[name]
    if name not in header.get("stacked", []):
        return {user: with_prefix(tensors, f"{name}/{user}/") for user in users}
    table = ClientTable(users)
    table.write(users, with_prefix(tensors, f"{name}/"))
    return table


def load_latest(path: Path, run: Run, sources: dict[str, str] | None = None) -> Outcome | None:
    """Read the latest valid checkpoint of the last two; None if no file exists.

    The use of the previous checkpoint is recorded as a failure in the outcome.

    Raises:
        UserError: no checkpoint is readable, or it is of another run or of other numerics, versions or data.
    """
    if not path.exists() and not previous_checkpoint(path).exists():
        return None
    try:
        return load_outcome(path, run, sources)
    except UnreadableCheckpoint as error:
        if not previous_checkpoint(path).exists():
            raise
        outcome = load_outcome(previous_checkpoint(path), run, sources)
        outcome.failures.append(
            ClientFailure(len(outcome.curve) + 1, f"{error.reason}; resumed from the previous checkpoint")
        )
        # The next round must not replace the valid checkpoint by the damaged one.
        save_outcome(path, run, outcome, sources)
        previous_checkpoint(path).unlink()
        return outcome


class UnreadableCheckpoint(UserError):
    """A checkpoint that is damaged or missing."""

    def __init__(self, path: Path, error: Exception) -> None:
        self.reason = f"checkpoint {path.name} cannot be read ({error})"
        super().__init__(f"checkpoint {path} cannot be read ({error}): delete it and resume; its run starts again")


def _read(path: Path) -> tuple[dict[str, Any], State]:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
            if metadata["crc32"] != str(checksum(metadata["outcome"], tensors)):
                raise UnreadableCheckpoint(path, ValueError("wrong checksum"))
            return json.loads(metadata["outcome"]), tensors
    except (SafetensorError, KeyError, json.JSONDecodeError, OSError) as error:
        raise UnreadableCheckpoint(path, error) from None

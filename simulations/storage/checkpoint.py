"""Runs on disk: one safetensors file a run, replaced whole after every round.

The file holds the server's and the clients' tensors, and in its header the curve, the scores and the run itself.
It is written beside itself, synced and renamed: a kill at any moment leaves the last complete round.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from clients.persistence import checksum, replace_file
from fedbn.errors import UserError
from fedbn.federation.metrics import Score
from fedbn.federation.run import Run
from fedbn.federation.server import ClientFailure, Outcome, RoundMetrics, Server
from fedbn.federation.traffic import Traffic
from fedbn.nn.roles import State
from simulations.storage.provenance import NUMERICS, check_numerics, code_digest, versions


def write_atomically(path: Path, data: bytes, keep: Path | None = None) -> None:
    """Write beside, sync, rename.

    Args:
        path: to be written.
        data: what it shall hold.
        keep: where the file that was there before goes; None: it is replaced.

    Raises:
        UserError: the place cannot be written; what was there before still is.
    """
    try:
        replace_file(path, data, keep)
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {error.strerror or error}; choose another --out or free the disk"
        ) from None


def before(path: Path) -> Path:
    """Where the checkpoint before the last one lies."""
    return path.with_name(f"{path.name}.before")


def save_outcome(
    path: Path, run: Run, outcome: Outcome, sources: dict[str, str] | None = None, keep: Path | None = None
) -> None:
    """Write an outcome, finished or not; what was there before goes to ``keep``, if given."""
    tensors = _prefixed("server", outcome.server.state) | _prefixed("memory", outcome.server.memory)
    if outcome.server.serving is not outcome.server.state:
        tensors |= _prefixed("serving", outcome.server.serving)
    server = outcome.server
    tensors |= _prefixed("known", server.known) | _prefixed("broadcast", server.broadcast)
    for view, entries in server.groups.items():
        tensors |= _prefixed(f"group/{view}", entries)
    for user, entries in server.client_statistics.items():
        tensors |= _prefixed(f"client_statistics/{user}", entries)
    for user, client_state in outcome.client_states.items():
        tensors |= _prefixed(f"client_states/{user}", client_state)
    header = {
        "run": run.to_json(),
        "numerics": NUMERICS,
        "code": code_digest(),
        "versions": versions(),
        "sources": sources or {},
        "seconds": outcome.seconds,
        "curve": [asdict(p) for p in outcome.curve],
        "client_states": sorted(outcome.client_states),
        "groups": list(server.groups),
        "client_statistics": list(server.client_statistics),
        "scores": {str(u): [asdict(s) for s in scores] for u, scores in outcome.scores.items()},
        "failures": [asdict(f) for f in outcome.failures],
        "traffic": asdict(outcome.traffic),
        "trained": {str(u): round for u, round in outcome.trained.items()},
    }
    text = json.dumps(header)
    metadata = {"outcome": text, "crc32": str(checksum(text, tensors))}
    write_atomically(path, save(tensors, metadata=metadata), keep)


def load_outcome(path: Path, run: Run, sources: dict[str, str] | None = None) -> Outcome:
    """Read an outcome of exactly this run, computed with the current numerics on the same data.

    Raises:
        UserError: unreadable file, another run, other numerics, versions or data.
    """
    header, tensors = _read(path)
    if header["run"] != run.to_json():
        raise UserError(f"{path} belongs to another run; delete it or choose another --out")
    check_numerics(path, header.get("numerics"))
    if changed := {k: v for k, v in header["versions"].items() if versions().get(k) != v}:
        raise UserError(
            f"{path} was made with other versions ({changed}): install those, or start afresh with another --out"
        )
    if sources is not None and header["sources"] != sources:
        raise UserError(
            f"{path} was made on other data (hashes differ): restore them, or start afresh with another --out"
        )
    state = _under("server", tensors)
    serving = _under("serving", tensors)
    return Outcome(
        server=Server(
            state,
            serving or state,
            _under("memory", tensors),
            {v: _under(f"group/{v}", tensors) for v in header["groups"]},
            _under("known", tensors),
            _under("broadcast", tensors),
            {u: _under(f"client_statistics/{u}", tensors) for u in header["client_statistics"]},
        ),
        client_states={u: _under(f"client_states/{u}", tensors) for u in header["client_states"]},
        curve=[RoundMetrics(**p) for p in header["curve"]],
        scores={int(u): [Score(**s) for s in scores] for u, scores in header["scores"].items()},
        seconds=header["seconds"],
        failures=[ClientFailure(**f) for f in header["failures"]],
        traffic=Traffic(**header["traffic"]),
        trained={int(u): round for u, round in header["trained"].items()},
    )


def load_latest(path: Path, run: Run, sources: dict[str, str] | None = None) -> Outcome | None:
    """The last checkpoint that can be read, of two; None if there is none.

    Falling back on the one before is a fault that the outcome tells of.

    Raises:
        UserError: no checkpoint can be read, or it is of another run, other numerics, versions or data.
    """
    if not path.exists() and not before(path).exists():
        return None
    try:
        return load_outcome(path, run, sources)
    except Unreadable as error:
        if not before(path).exists():
            raise
        outcome = load_outcome(before(path), run, sources)
        outcome.failures.append(
            ClientFailure(len(outcome.curve) + 1, f"{error.reason}; went on from the checkpoint before")
        )
        save_outcome(path, run, outcome, sources)  # or the next round would move the damaged one over the sound one
        before(path).unlink()
        return outcome


class Unreadable(UserError):
    """A checkpoint that is damaged or missing."""

    def __init__(self, path: Path, error: Exception) -> None:
        self.reason = f"checkpoint {path.name} cannot be read ({error})"
        super().__init__(f"checkpoint {path} cannot be read ({error}): delete it and resume; its run starts anew")


def _read(path: Path) -> tuple[dict[str, Any], State]:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
            if metadata["crc32"] != str(checksum(metadata["outcome"], tensors)):
                raise Unreadable(path, ValueError("its checksum is wrong"))
            return json.loads(metadata["outcome"]), tensors
    except (SafetensorError, KeyError, json.JSONDecodeError, OSError) as error:
        raise Unreadable(path, error) from None


def _prefixed(prefix: str, state: State) -> State:
    return {f"{prefix}/{k}": v.detach().cpu().contiguous().clone() for k, v in state.items()}


def _under(prefix: str, tensors: State) -> State:
    return {k.removeprefix(f"{prefix}/"): v for k, v in tensors.items() if k.startswith(f"{prefix}/")}

"""Run the cells of claims and store their results as JSON lines."""

from __future__ import annotations

import importlib
import json
import math
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from fedbn.files import with_checksum, without_checksum
from fedbn_simulations.claims.claim import Claim
from fedbn_simulations.claims.studies import common
from fedbn_simulations.flower.processes import end_with_parent
from fedbn_simulations.storage.provenance import NUMERICS, code_digest

FULL_SEEDS, QUICK_SEEDS = 10, 3
"""Paired seeds of full and quick runs; with fewer, Student's t intervals leave almost all claims undecided."""


@dataclass(frozen=True)
class Cell:
    """One arm with one seed: the unit of work.

    Attributes:
        study: name of the study's module.
        run: name of its function.
        arm: the arm to train.
        seed: random seed.
        quick: whether to run at reduced size.
    """

    study: str
    run: str
    arm: str
    seed: int
    quick: bool


def cell(claim: Claim, arm: str, seed: int, quick: bool) -> Cell:
    """The cell with the result of an arm of a claim."""
    return Cell(claim.study, claim.run.__name__, claim.trained(arm), seed, quick)


def cells(claims: Sequence[Claim], seeds: int, quick: bool) -> list[Cell]:
    """The cells of claims without duplicates; seeds are outermost, so that interrupted runs have complete seeds."""
    needed = (cell(c, arm, seed, quick) for seed in range(seeds) for c in claims for arm in c.arms)
    return list(dict.fromkeys(needed))


class Store:
    """Results of cells in a JSON Lines file. Lines of other numerics and damaged lines are ignored.

    Args:
        path: path of the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.results: dict[Cell, dict[str, Any]] = {}
        for text in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else ():
            try:
                line = without_checksum(json.loads(text))
            except ValueError:
                continue
            if line.get("numerics") == numerics(line["cell"]["study"]):
                self.results[Cell(**line["cell"])] = line

    def add(self, key: Cell, measured: dict[str, float], seconds: float) -> None:
        """Add a result and write it to disk immediately."""
        line = {
            "cell": asdict(key),
            "measured": measured,
            "seconds": seconds,
            "numerics": numerics(key.study),
            "code": code_digest(),
        }
        self.results[key] = line
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # A truncated line must not be joined with the next one.
        truncated = self.path.exists() and not self.path.read_bytes().endswith(b"\n")
        with self.path.open("a", encoding="utf-8") as file:
            file.write("\n" * (truncated and self.path.stat().st_size > 0) + json.dumps(with_checksum(line)) + "\n")
            file.flush()
            os.fsync(file.fileno())


def numerics(study: str) -> list[int]:
    """Numerics versions of the library, the common code of the studies and one study."""
    module = importlib.import_module(f"fedbn_simulations.claims.studies.{study}")
    return [NUMERICS, common.NUMERICS, module.NUMERICS]


def run_cell(key: Cell) -> tuple[dict[str, float], float]:
    """Run a cell; returns the measured quantities and the time in seconds.

    Raises:
        ValueError: a measured quantity is not finite.
    """
    torch.set_num_threads(1)
    start = time.perf_counter()
    run = getattr(importlib.import_module(f"fedbn_simulations.claims.studies.{key.study}"), key.run)
    measured = {k: float(v) for k, v in run(key.arm, key.seed, key.quick).items()}
    if invalid := [k for k, v in measured.items() if not math.isfinite(v)]:
        raise ValueError(f"{key}: {', '.join(invalid)} not finite")
    return measured, time.perf_counter() - start


def run_cells(cells: Sequence[Cell], store: Store, workers: int, done: Callable[[Cell], None]) -> None:
    """Run the cells that are not in the store, and store each result as soon as it is available."""
    missing = [key for key in cells if key not in store.results]
    for key in cells:
        if key in store.results:
            done(key)
    for key, (measured, seconds) in _results(missing, workers):
        store.add(key, measured, seconds)
        done(key)


def _results(missing: Sequence[Cell], workers: int) -> Iterator[tuple[Cell, tuple[dict[str, float], float]]]:
    if workers <= 1 or len(missing) <= 1:
        for key in missing:
            yield key, run_cell(key)
        return
    spawn = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(min(workers, len(missing)), mp_context=spawn, initializer=end_with_parent)
    try:
        futures = {pool.submit(run_cell, key): key for key in missing}
        for future in as_completed(futures):
            yield futures[future], future.result()
    finally:
        pool.shutdown(cancel_futures=True)

"""Run the cells of claims and store their results as JSON lines."""

from __future__ import annotations

import importlib
import json
import math
import multiprocessing
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from simulations.claims.claim import Claim
from simulations.claims.studies import common as bench
from simulations.storage.provenance import NUMERICS, code_digest

FULL_SEEDS, QUICK_SEEDS = 10, 3
"""Paired seeds of a full and of a quick run; with fewer, Student's t leaves nearly everything undecided."""


@dataclass(frozen=True)
class Cell:
    """One arm with one seed: the unit of work.

    Attributes:
        study: name of the study's file.
        run: name of its function.
        arm: what to train.
        seed: of everything random.
        quick: at reduced size.
    """

    study: str
    run: str
    arm: str
    seed: int
    quick: bool


def cell(claim: Claim, arm: str, seed: int, quick: bool) -> Cell:
    """The cell that holds an arm of a claim."""
    return Cell(claim.study, claim.run.__name__, claim.trained(arm), seed, quick)


def cells(claims: Sequence[Claim], seeds: int, quick: bool) -> list[Cell]:
    """What the claims need, each cell once; seeds outermost, so that an interrupted run holds whole comparisons."""
    wanted = (cell(c, arm, seed, quick) for seed in range(seeds) for c in claims for arm in c.arms)
    return list(dict.fromkeys(wanted))


class Store:
    """Results of cells, in a file of JSON lines; lines of other numerics are left out, and so is a torn last line.

    Args:
        path: the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.found: dict[Cell, dict[str, Any]] = {}
        for text in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
            try:
                line = json.loads(text)
            except json.JSONDecodeError:
                continue
            if line.get("numerics") == numerics(line["cell"]["study"]):
                self.found[Cell(**line["cell"])] = line

    def add(self, key: Cell, measured: dict[str, float], seconds: float) -> None:
        """Keep a result, on disk at once."""
        line = {
            "cell": asdict(key),
            "measured": measured,
            "seconds": seconds,
            "numerics": numerics(key.study),
            "code": code_digest(),
        }
        self.found[key] = line
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # A torn line must not swallow the one after it.
        torn = self.path.exists() and not self.path.read_bytes().endswith(b"\n")
        with self.path.open("a", encoding="utf-8") as file:
            file.write("\n" * (torn and self.path.stat().st_size > 0) + json.dumps(line) + "\n")


def numerics(study: str) -> list[int]:
    """Versions of the numbers of the library, of the studies' common code and of one study."""
    module = importlib.import_module(f"simulations.claims.studies.{study}")
    return [NUMERICS, bench.NUMERICS, module.NUMERICS]


def run_cell(key: Cell) -> tuple[dict[str, float], float]:
    """Run one cell; gives what was measured, and seconds.

    Raises:
        ValueError: a measured quantity is not finite.
    """
    torch.set_num_threads(1)
    began = time.perf_counter()
    run = getattr(importlib.import_module(f"simulations.claims.studies.{key.study}"), key.run)
    measured = {k: float(v) for k, v in run(key.arm, key.seed, key.quick).items()}
    if bad := [k for k, v in measured.items() if not math.isfinite(v)]:
        raise ValueError(f"{key}: {', '.join(bad)} not finite")
    return measured, time.perf_counter() - began


def run_cells(wanted: Sequence[Cell], store: Store, workers: int, done: Callable[[Cell], None]) -> None:
    """Run the cells that the store does not have; every result is kept as it comes."""
    missing = []
    for key in wanted:
        if key in store.found:
            done(key)
        else:
            missing.append(key)
    for key, (measured, seconds) in _results(missing, workers):
        store.add(key, measured, seconds)
        done(key)


def _results(missing: Sequence[Cell], workers: int) -> Iterator[tuple[Cell, tuple[dict[str, float], float]]]:
    if workers <= 1 or len(missing) <= 1:
        for key in missing:
            yield key, run_cell(key)
        return
    pool = ProcessPoolExecutor(min(workers, len(missing)), mp_context=multiprocessing.get_context("spawn"))
    try:
        futures = {pool.submit(run_cell, key): key for key in missing}
        for future in as_completed(futures):
            yield futures[future], future.result()
    finally:
        pool.shutdown(cancel_futures=True)

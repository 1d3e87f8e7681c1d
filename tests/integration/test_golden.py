"""Short stored learning curves and final losses of every strategy, in float64.

A change that alters them states the reason and regenerates them:
``FEDBN_WRITE_GOLDEN=1 pytest tests/integration/test_golden.py``.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from statistics import mean

import pytest

from fedbn.federation.loop import federate
from fedbn.strategies.base import strategies
from fedbn_simulations.storage.provenance import NUMERICS
from tests.helpers import double_precision, mostly_slow

GOLDEN = Path(__file__).parents[1] / "golden" / "curves.json"


QUICK = ("centralized", "fedbn", "fedtan", "groupnorm", "hbn", "silobn")


@pytest.mark.parametrize("name", mostly_slow(strategies(), *QUICK))
def test_learning_curve_matches_golden(name, small):
    run = small(name, rounds=3)
    with double_precision(run) as ctx:
        outcome = federate(run, ctx=ctx)
    cells = [s for scores in outcome.scores.values() for s in scores]
    curve = [[p.train_loss, p.own, p.unseen] for p in outcome.curve]
    losses = {f"{s.row}/{s.column}": [] for s in cells}
    for s in cells:
        losses[f"{s.row}/{s.column}"].append(s.metrics["loss"])
    actual = {"curve": curve, "loss": {cell: mean(values) for cell, values in losses.items()}}
    stored = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
    if os.environ.get("FEDBN_WRITE_GOLDEN"):
        stored[name] = json.loads(json.dumps(actual), parse_float=lambda text: float(f"{float(text):.12g}"))
        GOLDEN.parent.mkdir(exist_ok=True)
        GOLDEN.write_text(json.dumps(dict(sorted(stored.items())), indent=1) + "\n")
        return
    # In float64, processors differ by about 1e-15, which training amplifies; float32 would need much wider tolerances.
    assert actual["loss"] == pytest.approx(stored[name]["loss"], rel=1e-9)
    for point, old in zip(actual["curve"], stored[name]["curve"], strict=True):
        assert point == pytest.approx(old, rel=1e-9)


def test_numerics_version_matches_golden_curves():
    """New curves invalidate stored results: increment `NUMERICS` and add the new digest of the file here."""
    digests = {1: "1f1817a303f7b115", 2: "93849ebd613c8d51", 3: "93849ebd613c8d51"}
    assert hashlib.sha256(GOLDEN.read_bytes()).hexdigest()[:16] == digests[NUMERICS]

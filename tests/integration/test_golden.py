"""Short stored learning curves of every strategy.

A change that alters them states the reason and regenerates them:
``FEDBN_WRITE_GOLDEN=1 pytest tests/integration/test_golden.py``.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest

from fedbn.federation.loop import federate
from fedbn.strategies.base import strategies
from simulations.storage.provenance import NUMERICS

GOLDEN = Path(__file__).parents[1] / "golden" / "curves.json"


@pytest.mark.parametrize("name", strategies())
def test_learning_curve_matches_golden(name, small):
    curve = [[p.train_loss, p.own, p.unseen] for p in federate(small(name, rounds=3)).curve]
    stored = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
    if os.environ.get("FEDBN_WRITE_GOLDEN"):
        stored[name] = [[v if v is None else round(v, 5) for v in point] for point in curve]
        GOLDEN.parent.mkdir(exist_ok=True)
        GOLDEN.write_text(json.dumps(dict(sorted(stored.items())), indent=1) + "\n")
        return
    for point, old in zip(curve, stored[name], strict=True):
        # Kernels differ between processors; over three rounds, by less than one percent of the loss and two rows.
        assert point[0] == pytest.approx(old[0], rel=0.01)
        assert point[1] == pytest.approx(old[1], abs=0.01)
        assert point[2] == (None if old[2] is None else pytest.approx(old[2], abs=0.03))


def test_numerics_version_matches_golden_curves():
    """New curves invalidate stored results: increment `NUMERICS` and add the new digest of the file here."""
    digests = {1: "a0f5ce8e789c8764"}
    assert hashlib.sha256(GOLDEN.read_bytes()).hexdigest()[:16] == digests[NUMERICS]

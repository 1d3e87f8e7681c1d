"""Heavy packages that no run needs are not imported by one; scikit-learn itself imports pandas and SciPy."""

from __future__ import annotations

import subprocess
import sys

import pytest

SCRIPT = """
import sys
import fedbn_simulations.experiments.compare
from fedbn.config import Plan
from fedbn.federation.run import Run
from fedbn_simulations.engines.execute import execute

execute(Run("digits8", "fedbn", plan=Plan(rounds=1), model="mlp"), "grid:stacked")
print([name for name in ("matplotlib", "sympy") if name in sys.modules])
"""


@pytest.mark.slow
def test_run_imports_no_package_of_the_report():
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"

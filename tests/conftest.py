from __future__ import annotations

import hypothesis
import pytest
import torch

from fedbn.federation.run import Run, plan_for

hypothesis.settings.register_profile("fedbn", deadline=None, max_examples=60, derandomize=True)
hypothesis.settings.load_profile("fedbn")


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture
def small():
    """A function giving a short run on scikit-learn's digits."""

    def make(strategy="global-naive", **settings):
        run = {k: settings.pop(k) for k in ("seed", "model", "partition", "shift", "validation") if k in settings}
        scenario = "digits8:images=600"
        plan = plan_for(scenario, **{"rounds": 2, "batch_size": 32, "eval_every": 1, "global_test": 60, **settings})
        return Run(scenario, strategy, plan=plan, **run).resolved()

    return make

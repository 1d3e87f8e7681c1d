import pytest

from fedbn.config import Plan
from fedbn.errors import UserError
from fedbn.federation.run import Run
from fedbn_simulations.leakage.sums import measure_sums

RUN = Run("digits8:users=4:unseen=1", "fedavg", plan=Plan(rounds=1, eval_every=1))


def test_noise_hides_what_sums_reveal():
    clear, hidden = measure_sums(RUN, ["matched"], ("", "clip=1:noise=100"))
    assert clear.share_error == 0  # counts are sent as they are
    assert clear.guess_error > 0
    assert hidden.share_error > clear.share_error
    assert clear.bytes == hidden.bytes == 8 * (10 + 10 * 64 + 64 * 64)
    assert clear.found >= hidden.found
    assert (clear.users, clear.chance) == (3, 1 / 3)


def test_secure_sums_are_not_measured_one_by_one():
    with pytest.raises(UserError, match="secure=true hides the sums of single clients"):
        measure_sums(RUN, ["matched"], ("secure=true",))

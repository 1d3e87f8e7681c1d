import pytest
import torch

from fedbn.seeds import key, seed_torch, seeded


def draw() -> torch.Tensor:
    return torch.cat([torch.rand(3), torch.dropout(torch.ones(20), 0.5, train=True)])


@pytest.mark.parametrize("value", [0, 1, key(7, "noise", 3)])
def test_seed_torch_draws_the_numbers_of_manual_seed(value: int) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(value)
        expected = draw()
        seed_torch(value)
        assert torch.equal(draw(), expected)


def test_seeded_restores_the_generator() -> None:
    before = torch.get_rng_state()
    with seeded(0, "purpose"):
        first = draw()
    assert torch.equal(torch.get_rng_state(), before)
    with seeded(0, "purpose"):
        assert torch.equal(draw(), first)
    with seeded(0, "another purpose"):
        assert not torch.equal(draw(), first)

"""ResMLP: order of modules, parameter counts, flags, and uncertainty from dropout."""

from __future__ import annotations

import torch
from torch import nn

from fedbn.models.resmlp import Residual, ResMLP, mc_dropout
from fedbn.nn.roles import norm_layers
from tests.fedbn.helpers import rejects


def parameters(model):
    return sum(p.numel() for p in model.parameters())


def test_resmlp_parameter_count_matches_paper():
    """Residual: 2 (n^2 + n) and an IC of 2n before each layer but the first; down: n^2/2 + n/2 and an IC."""
    total, first = 0, True
    for n in (512, 256, 128, 64):
        total += 2 * (n * n + n) + (2 * n if first else 4 * n)
        total += n * n // 2 + n // 2 + 2 * n
        first = False
    assert parameters(ResMLP((512,), 2)) == total + 32 * 2 + 2
    assert parameters(ResMLP((512,), 101, blocks=2)) == (
        2 * (512 * 512 + 512) + 2 * 512 + 512 * 256 + 256 + 2 * 512
        + 2 * (256 * 256 + 256) + 4 * 256 + 256 * 128 + 128 + 2 * 256
        + 128 * 101 + 101
    )  # fmt: skip


def test_resmlp_module_order_matches_paper():
    kinds = (nn.Linear, nn.BatchNorm1d, nn.Dropout)
    order = [type(m).__name__ for m in ResMLP((16,), 2, blocks=2, residuals=2).modules() if isinstance(m, kinds)]
    down = ["BatchNorm1d", "Dropout", "Linear"]
    residual = down * 2
    assert order == ["Linear", *down, *residual, *down, *residual, *residual, *down, "Linear"]


def test_resmlp_without_ic_and_skip_is_plain_mlp():
    net = ResMLP((16,), 3, blocks=2, ic=False, skip=False)
    assert not norm_layers(net)
    assert not [m for m in net.modules() if isinstance(m, nn.Dropout)]
    linears = [m for m in net.modules() if isinstance(m, nn.Linear)]
    plain = nn.Sequential(*[part for m in linears[:-1] for part in (m, nn.ReLU())], linears[-1])
    x = torch.randn(5, 16)
    torch.testing.assert_close(net(x), plain(x))


def test_residual_adds_input_before_last_relu():
    block = Residual(6, 0.0, ic=True, skip=True, first=False).eval()
    x = torch.randn(4, 6)
    h = block.linear2(block.ic2(torch.relu(block.linear1(block.ic1(x)))))
    torch.testing.assert_close(block(x), torch.relu(h + x))
    block.skip = False
    torch.testing.assert_close(block(x), torch.relu(h))


def test_resmlp_without_dropout_is_deterministic():
    torch.manual_seed(0)  # some initializations have a constant output
    x = torch.randn(32, 16)
    deterministic, noisy = ResMLP((16,), 2, p=0.0), ResMLP((16,), 2, p=0.5)
    assert torch.equal(deterministic(x), deterministic(x))
    assert not torch.equal(noisy(x), noisy(x))


def test_mc_dropout_keeps_bn_in_evaluation_mode():
    torch.manual_seed(0)
    net, x = ResMLP((16,), 3, p=0.4), torch.randn(20, 16)
    net(x)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    state = torch.get_rng_state()
    p, entropy = mc_dropout(net, x, samples=8, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert not any(m.training for m in net.modules())
    torch.testing.assert_close(p.sum(1), torch.ones(20))
    torch.testing.assert_close(entropy, -(p * p.log()).sum(1))
    assert not torch.allclose(p, net(x).softmax(1))
    # With p=0 a row does not depend on the rest of the batch.
    deterministic = ResMLP((16,), 3, p=0.0)
    whole, single = (mc_dropout(deterministic, rows, samples=2)[0] for rows in (x, x[:1]))
    torch.testing.assert_close(whole[:1], single)
    assert torch.equal(p, mc_dropout(net, x, samples=8, seed=1)[0])
    assert not torch.equal(p, mc_dropout(net, x, samples=8, seed=2)[0])


def test_resmlp_rejects_too_few_features():
    rejects("halves its width 4 times: 15 features are too few, 16 needed", ResMLP, (15,), 2)

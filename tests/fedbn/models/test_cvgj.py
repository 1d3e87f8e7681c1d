"""The cvgj networks: layers as published, BN on the data, the polynomial schedule, and pretrained weights."""

from __future__ import annotations

import pickle

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from fedbn.errors import UserError
from fedbn.integrations.pretrained import load_pretrained, read_state
from fedbn.models.cvgj import AlexNetCvgj, ResNet10Cvgj, ResNet50Cvgj, VGG19Cvgj
from fedbn.models.resnet20 import ResNet20
from tests.fedbn.helpers import rejects

NETS = (AlexNetCvgj, VGG19Cvgj, ResNet10Cvgj, ResNet50Cvgj)


def count(model, kind):
    return sum(isinstance(m, kind) for m in model.modules())


@pytest.mark.parametrize(
    ("net", "side", "convolutions", "linears", "norms", "scaled"),
    [
        (AlexNetCvgj, 227, 5, 3, 8, 1),
        (VGG19Cvgj, 224, 16, 3, 19, 1),
        (ResNet10Cvgj, 224, 12, 1, 10, 10),
        (ResNet50Cvgj, 224, 53, 1, 50, 50),
    ],
)
@pytest.mark.parametrize("small", [False, True])
def test_cvgj_layer_counts_match_publication(net, side, convolutions, linears, norms, scaled, small):
    shape = (3, 32, 32) if small else (3, side, side)
    with torch.device("meta"):
        model = net(shape, 1000, width_mult=1)
    bns = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d | nn.BatchNorm1d)]
    counts = (count(model, nn.Conv2d), count(model, nn.Linear), len(bns), sum(m.affine for m in bns))
    assert counts == (convolutions, linears, norms, scaled)
    assert model.data.affine
    assert count(model, nn.Dropout) == count(model, nn.LocalResponseNorm) == 0


def test_alexnet_widths_and_layer_order_match_publication():
    with torch.device("meta"):
        model = AlexNetCvgj((3, 227, 227), 1000, width_mult=1)
    convs = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert [(m.out_channels, m.kernel_size[0], m.groups) for m in convs] == [
        (96, 11, 1), (256, 5, 2), (384, 3, 1), (384, 3, 2), (256, 3, 2),
    ]  # fmt: skip
    assert convs[0].stride == (4, 4)
    names = [type(m).__name__ for m in model.features]
    block = ["Conv2d", "BatchNorm2d", "ReLU"]
    assert names == [*block, "MaxPool2d", *block, "MaxPool2d", *block, *block, *block, "MaxPool2d"]
    assert model.hidden[0].in_features == 256 * 6 * 6


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 28, 30), (3, 64, 67)])
def test_cvgj_accepts_every_image_size(net, shape):
    model = net(shape, 7, width_mult=1 / 16)
    assert model(torch.randn(2, *shape)).shape == (2, 7)


@pytest.mark.parametrize("net", NETS)
def test_bn_on_data_removes_gain_and_offset_of_channels(net):
    torch.manual_seed(0)
    model = net((3, 16, 16), 5, width_mult=1 / 8).double().train()
    # Fifty layers amplify the effect of eps on a small variance.
    model.data.eps = 1e-12
    x = torch.randn(8, 3, 16, 16, dtype=torch.float64)
    a, b = torch.tensor([0.5, 2.0, 7.0]).view(1, 3, 1, 1), torch.tensor([1.0, -3.0, 9.0]).view(1, 3, 1, 1)
    assert (model(x) - model(a * x + b)).abs().max() < 1e-6
    assert (model(x) - model(-x)).abs().max() > 1e-3


def test_bias_before_bn_has_no_effect():
    model = AlexNetCvgj((3, 16, 16), 5, width_mult=1 / 8).double().train()
    x = torch.randn(8, 3, 16, 16, dtype=torch.float64)
    before = model(x)
    model.features[0].register_forward_hook(lambda m, a, out: out + 3.0)
    torch.testing.assert_close(model(x), before)


def test_preact_unit_expands_pre_activated_tensor():
    unit = next(u for u in ResNet10Cvgj((3, 16, 16), 5).stages if u.expand is not None).eval()
    x = torch.randn(2, unit.expand.in_channels, 8, 8)
    h = torch.relu(unit.activate[0](x))
    torch.testing.assert_close(unit(x), unit.body(h) + unit.expand(h))
    assert isinstance(ResNet10Cvgj((3, 16, 16), 5).stages[0].activate, nn.Identity)


def test_polynomial_schedule_reaches_zero_linearly():
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=0.4)
    schedule = torch.optim.lr_scheduler.PolynomialLR(optimizer, 4)
    rates = []
    for _ in range(4):
        optimizer.step()
        schedule.step()
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([0.3, 0.2, 0.1, 0.0])


@pytest.mark.parametrize("net", NETS)
def test_cvgj_rejects_inputs_that_are_not_images(net):
    rejects(rf"{net.name} takes images \[channels, >= 8, >= 8\]", net, (6, 128), 3)


# --- pretrained weights


@pytest.fixture
def trained():
    model = ResNet20((3, 8, 8), 10)
    model(torch.randn(4, 3, 8, 8))
    return model


@pytest.mark.parametrize("layout", ["safetensors", "pt", "wrapped", "parallel"])
def test_load_pretrained_keeps_head_of_other_size(trained, tmp_path, layout):
    state = trained.state_dict()
    path = tmp_path / ("w.safetensors" if layout == "safetensors" else "w.pth")
    if layout == "safetensors":
        save_file(state, path)
    elif layout == "wrapped":
        torch.save({"state_dict": state, "epoch": 3}, path)
    else:
        torch.save({f"module.{k}": v for k, v in state.items()} if layout == "parallel" else state, path)
    model = ResNet20((3, 8, 8), 4)
    head = model.fc.weight.detach().clone()
    assert load_pretrained(model, path) == ["fc.weight", "fc.bias"]
    assert torch.equal(model.fc.weight, head)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items() if not k.startswith("fc."))
    twin = ResNet20((3, 8, 8), 10)
    assert load_pretrained(twin, path) == []
    assert torch.equal(twin.fc.weight, trained.fc.weight)


def test_load_pretrained_accepts_missing_batch_counters(trained, tmp_path):
    state = {k: v for k, v in trained.state_dict().items() if "num_batches" not in k}
    save_file(state, tmp_path / "old.safetensors")
    missing = load_pretrained(ResNet20((3, 8, 8), 10), tmp_path / "old.safetensors")
    assert {k.rpartition(".")[2] for k in missing} == {"num_batches_tracked"}


class Payload:
    def __reduce__(self):
        return (print, ("code has run",))


def test_read_state_does_not_run_code(tmp_path, capsys):
    (tmp_path / "evil.pth").write_bytes(pickle.dumps({"w": Payload()}))
    torch.save({"w": Payload()}, tmp_path / "evil.pt")
    for name in ("evil.pth", "evil.pt"):
        rejects("whole pickled models are refused because loading them runs code", read_state, tmp_path / name)
    assert "code has run" not in capsys.readouterr().out


def test_load_pretrained_rejects_bad_input(trained, tmp_path):
    state = trained.state_dict()
    path = tmp_path / "w.safetensors"

    def message(entries, model):
        save_file(entries, path)
        with pytest.raises(UserError) as error:
            load_pretrained(model, path)
        return str(error.value)

    fresh = ResNet20((3, 8, 8), 10)
    assert "lack entries of ResNet20 (1: bn1.weight)" in message(
        {k: v for k, v in state.items() if k != "bn1.weight"}, fresh
    )
    assert "have entries that are not in ResNet20 (1: more)" in message(state | {"more": torch.ones(1)}, fresh)
    assert "conv1.weight has shape [16, 3, 3, 3]" in message(state, ResNet20((1, 8, 8), 10))
    rejects("no weights at", read_state, tmp_path / "none.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    rejects("holds a list that is not a state dict", read_state, tmp_path / "list.pt")
    (tmp_path / "torn.safetensors").write_bytes(b"abc")
    rejects("cannot be read as weights alone", read_state, tmp_path / "torn.safetensors")

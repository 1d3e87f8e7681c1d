"""The callback converts layers before the optimizers are created and recalibrates statistics after training."""

from __future__ import annotations

import sys
from importlib.util import find_spec

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from fedbn.errors import UserError
from fedbn.integrations.lightning import first_tensor, normalization
from fedbn.statistics.recalibration import recalibrate, statistics_of

if find_spec("lightning") is None:
    pytest.skip("Lightning is not installed", allow_module_level=True)

pytestmark = pytest.mark.filterwarnings("ignore")


def module():
    from lightning.pytorch import LightningModule

    class Net(LightningModule):
        def __init__(self):
            super().__init__()
            self.layers = nn.Sequential(
                nn.Linear(3, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 2)
            )

        def forward(self, x):
            return self.layers(x)

        def training_step(self, batch, index):
            x, y = batch.values() if isinstance(batch, dict) else batch
            return cross_entropy(self(x), y)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.5)

    torch.manual_seed(0)
    return Net()


X = torch.randn(70, 3, generator=torch.Generator().manual_seed(1)) * 2 + 1
DATA = TensorDataset(X, (X.sum(1) > 3).long())


def fit(net, *callbacks, data=None):
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    options |= {"enable_model_summary": False, "accelerator": "cpu", "max_epochs": 2}
    from lightning.pytorch import Trainer

    Trainer(callbacks=list(callbacks), **options).fit(net, data or DataLoader(DATA, batch_size=16))


def test_normalization_recalibrates_with_final_weights():
    net = module()
    fit(net, normalization())
    other = module()
    other.load_state_dict(net.state_dict())
    for layer in other.modules():
        if isinstance(layer, nn.BatchNorm1d):
            layer.reset_running_stats()
    expected = statistics_of(recalibrate(other, X))
    for name, value in statistics_of(net).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6)
    plain = module()
    fit(plain, normalization(rows=0))
    torch.testing.assert_close(plain.layers[0].weight, net.layers[0].weight, rtol=0, atol=0)
    assert not torch.allclose(plain.layers[1].running_mean, net.layers[1].running_mean, atol=1e-3)


def test_normalization_uses_whole_batches_up_to_rows():
    net = module()
    fit(net, normalization(rows=20))
    expected = statistics_of(recalibrate(net, X[:32]))
    torch.testing.assert_close(statistics_of(net), expected)
    assert int(net.layers[1].num_batches_tracked) == 10


def test_normalization_converts_once_and_trains_layers():
    net, callback = module(), normalization("group", groups=4, rows=0)
    fit(net, callback)
    layer = net.layers[1]
    assert isinstance(layer, nn.GroupNorm)
    assert layer.num_groups == 4
    assert (layer.weight - 1).abs().max() > 1e-3, "the optimizer must update the converted layer"
    fit(net, callback)
    assert net.layers[1] is layer


def test_normalization_accepts_inputs_function():
    class Named(torch.utils.data.Dataset):
        def __len__(self):
            return len(DATA)

        def __getitem__(self, i):
            return {"x": DATA[i][0], "y": DATA[i][1]}

    net = module()
    fit(net, normalization(inputs=lambda batch: batch["x"]), data=DataLoader(Named(), batch_size=16))
    torch.testing.assert_close(statistics_of(net), statistics_of(recalibrate(net, X)))
    with pytest.raises(UserError, match=r"a batch is a dict: set normalization\(inputs=...\)"):
        fit(module(), normalization(), data=DataLoader(Named(), batch_size=16))


@pytest.mark.parametrize(
    ("callback", "message"),
    [
        (lambda: normalization("grup"), "Did you mean 'group'"),
        (lambda: normalization("group", grups=4), "Did you mean 'groups'"),
        (lambda: normalization("group"), "no layer that keeps any"),
        (lambda: normalization(rows=-1), "0 or more, not -1"),
    ],
)
def test_normalization_rejects_bad_input_before_training(callback, message):
    net = module()
    net.training_step = lambda *_: pytest.fail("trained before validation")
    with pytest.raises(UserError, match=message):
        fit(net, callback())


def test_normalization_rejects_several_processes():
    trainer = type("Trainer", (), {"world_size": 2})()
    with pytest.raises(UserError, match="2 processes"):
        normalization().setup(trainer, module(), "fit")
    normalization().setup(trainer, module(), "test")


def test_normalization_without_lightning_suggests_package(monkeypatch):
    from fedbn.integrations import lightning

    lightning._callback_class.cache_clear()
    monkeypatch.setitem(sys.modules, "lightning.pytorch", None)
    with pytest.raises(UserError, match=r"pip install 'fedbn\[lightning\]'"):
        normalization()


@pytest.mark.parametrize("batch", [(), {"x": X}, ("x",)])
def test_first_tensor_rejects_bad_batch(batch):
    with pytest.raises(UserError, match="set normalization"):
        first_tensor(batch)

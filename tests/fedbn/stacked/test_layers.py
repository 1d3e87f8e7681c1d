"""Stacked layers equal separate layers: outputs, gradients and statistics."""

from __future__ import annotations

from importlib import import_module

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from fedbn.nn.batchnorm import AnyBatchNorm, AnyInstanceNorm
from fedbn.nn.conversion import convert, kinds
from fedbn.norms.batch_renorm import BatchRenorm
from fedbn.norms.dbn import DiminishingBN
from fedbn.norms.evalnorm import EvalNorm
from fedbn.norms.exchanged import ExchangedNorm
from fedbn.norms.feature_norm import FeatureNormLinear
from fedbn.norms.full_norm import FullNorm
from fedbn.norms.ghost_bn import GhostBN
from fedbn.norms.hybrid import HybridNorm
from fedbn.norms.iabn import IABN
from fedbn.norms.shared_statistics import SharedStatisticsNorm
from fedbn.stacked.layers import FEATURE_LAYERS, STACKED_LAYERS, VIEW_LAYERS, Unstackable
from fedbn.stacked.program import build_program
from tests.fedbn.stacked.programs import assert_program_matches
from tests.helpers import mostly_slow

CONSTANT = (nn.ConstantPad1d, nn.ConstantPad2d, nn.ConstantPad3d)
OTHER_PADS = (
    *(nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d, nn.ReflectionPad1d, nn.ReflectionPad2d, nn.ReflectionPad3d),
    *(nn.ReplicationPad1d, nn.ReplicationPad2d, nn.ReplicationPad3d),
)
LAYERS = {
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, 2, 1, groups=2), (4, 9)),
    "conv1d same": (lambda: nn.Conv1d(4, 6, 3, padding="same", dilation=2, bias=False), (4, 9)),
    "conv2d": (lambda: nn.Conv2d(4, 6, (3, 2), (2, 1), 1, (1, 2)), (4, 7, 6)),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2), (2, 4, 4, 4)),
    "transposed conv1d": (lambda: nn.ConvTranspose1d(4, 6, 3, 2, 1, 1, groups=2, bias=False), (4, 5)),
    "transposed conv2d": (lambda: nn.ConvTranspose2d(4, 2, (3, 2), (2, 1), 1, (1, 0), 2, dilation=(1, 2)), (4, 4, 5)),
    "transposed conv3d": (lambda: nn.ConvTranspose3d(2, 3, 2), (2, 3, 2, 2)),
    "linear": (lambda: nn.Linear(5, 3), (5,)),
    "linear without bias": (lambda: nn.Linear(5, 3, bias=False), (5,)),
    "linear with feature normalization": (lambda: FeatureNormLinear(5, 3), (5,)),
    "bn of features": (lambda: nn.BatchNorm1d(5), (5,)),
    "bn of signals": (lambda: nn.BatchNorm1d(5, momentum=0.3), (5, 4)),
    "bn of images": (lambda: AnyBatchNorm(3, affine=False), (3, 4, 5)),
    "bn without statistics": (lambda: nn.BatchNorm2d(3, track_running_stats=False), (3, 4, 5)),
    "instance": (lambda: AnyInstanceNorm(3, affine=True), (3, 4, 5)),
    "instance with statistics": (lambda: nn.InstanceNorm1d(3, track_running_stats=True), (3, 6)),
    "group": (lambda: nn.GroupNorm(2, 4), (4, 5)),
    "layer": (lambda: nn.LayerNorm((3, 5)), (3, 5)),
    "layer of the last axis": (lambda: nn.LayerNorm(5), (3, 5)),
    "max pool": (lambda: nn.MaxPool1d(3, 2, 1), (3, 9)),
    "average pool": (lambda: nn.AvgPool1d(2, ceil_mode=True), (3, 9)),
    "adaptive pool": (lambda: nn.AdaptiveAvgPool2d((2, 1)), (3, 5, 4)),
    "flatten": (lambda: nn.Flatten(), (3, 5)),
    "activation": (lambda: nn.GELU(), (3, 5)),
    "conv2d depthwise": (lambda: nn.Conv2d(3, 6, (3, 2), (1, 2), (2, 0), groups=3), (3, 5, 6)),
    "conv1d depthwise": (lambda: nn.Conv1d(3, 3, 4, 3, 2, 2, 3, False), (3, 11)),
    "group of images": (lambda: nn.GroupNorm(2, 4), (4, 5, 3)),
    "layer of channels and positions": (lambda: nn.LayerNorm((3, 5, 2)), (3, 5, 2)),
    "bn of volumes": (lambda: nn.BatchNorm3d(2), (2, 2, 3, 2)),
    "instance of volumes": (lambda: nn.InstanceNorm3d(2), (2, 2, 3, 2)),
    "instance of images": (lambda: nn.InstanceNorm2d(2, affine=True), (2, 3, 2)),
    "max pool dilated": (lambda: nn.MaxPool2d((2, 3), 1, 1, (1, 2), ceil_mode=True), (3, 6, 9)),
    "max pool of volumes": (lambda: nn.MaxPool3d(2, 1), (3, 3, 4, 2)),
    "average pool without padding": (lambda: nn.AvgPool2d((3, 2), 2, 1, True, False), (3, 6, 5)),
    "average pool of padding": (lambda: nn.AvgPool1d(3, 2, 1, ceil_mode=False, count_include_pad=True), (3, 8)),
    "average pool with divisor": (lambda: nn.AvgPool2d(3, 1, 1, divisor_override=4), (3, 6, 5)),
    "average pool of volumes": (lambda: nn.AvgPool3d((2, 1, 3), 1), (3, 3, 4, 3)),
    "adaptive pool of signals": (lambda: nn.AdaptiveAvgPool1d(4), (3, 7)),
    "adaptive max pool": (lambda: nn.AdaptiveMaxPool2d((2, None)), (3, 5, 4)),
    "adaptive max pool of signals": (lambda: nn.AdaptiveMaxPool1d(3), (3, 7)),
    "adaptive pool of volumes": (lambda: nn.AdaptiveAvgPool3d(2), (2, 3, 2, 4)),
    "adaptive max pool of volumes": (lambda: nn.AdaptiveMaxPool3d(2), (2, 3, 2, 4)),
    "flatten some axes": (lambda: nn.Flatten(1, 2), (3, 5, 2)),
    "upsample": (lambda: nn.Upsample(scale_factor=2, mode="bilinear"), (3, 4, 5)),
    "upsample signals": (lambda: nn.Upsample(7, mode="linear", align_corners=True), (3, 4)),
    "upsample nearest": (lambda: nn.UpsamplingNearest2d(scale_factor=3), (3, 2, 3)),
    "upsample bilinear": (lambda: nn.UpsamplingBilinear2d((3, 5)), (3, 2, 3)),
    "pixel shuffle": (lambda: nn.PixelShuffle(2), (8, 2, 3)),
    "pixel unshuffle": (lambda: nn.PixelUnshuffle(2), (2, 4, 6)),
    "softmax": (lambda: nn.Softmax(1), (3, 4)),
    "softmax of positions": (lambda: nn.Softmax(-1), (3, 4, 5)),
    "log softmax": (lambda: nn.LogSoftmax(1), (3, 4)),
    **{kind.__name__: (lambda kind=kind: kind(1, 2.0), (2, *[4] * n)) for n, kind in enumerate(CONSTANT, 1)},
    **{kind.__name__: (lambda kind=kind: kind(1), (2, *[4] * (i % 3 + 1))) for i, kind in enumerate(OTHER_PADS)},
    "dropout": (lambda: nn.Dropout(0.3), (3, 5, 2)),
    "dropout1d": (lambda: nn.Dropout1d(0.3), (3, 5)),
    "dropout2d": (lambda: nn.Dropout2d(0.3), (3, 5, 2)),
    "dropout3d": (lambda: nn.Dropout3d(1.0), (3, 5, 2, 2)),
    **{kind.__name__: (lambda kind=kind: kind(), (3, 5)) for kind in STACKED_LAYERS if kind in FEATURE_LAYERS[4:]},
    "relu6 in place": (lambda: nn.ReLU6(inplace=True), (5,)),
}
OWN_CODE = {
    "batch renorm": (lambda: BatchRenorm(3, start=0, r_full=2, d_full=2), (3, 4)),
    "diminishing bn": (lambda: DiminishingBN(3, alpha="1/m", mode="algorithm1"), (3, 4, 2)),
    "diminishing bn of variances": (lambda: DiminishingBN(3, stat="var", unbiased=True), (3,)),
    "evalnorm": (lambda: EvalNorm(3, rule="1/M^2", size=8), (3, 4)),
    "evalnorm, learned": (lambda: EvalNorm(3, rule="learned"), (3, 4)),
    "evalnorm of features": (lambda: EvalNorm(3, size=8), (3,)),
    "exchanged": (lambda: ExchangedNorm(3), (3, 4)),
    "full norm": (lambda: FullNorm(3, a=0.3), (3, 4)),
    "ghost bn": (lambda: GhostBN(3, size=2), (3,)),
    "hybrid": (lambda: HybridNorm(3), (3, 4)),
    "iabn": (lambda: IABN(3, k=0.5), (3, 4, 2)),
    "shared statistics": (lambda: SharedStatisticsNorm(3), (3, 4)),
    "weight norm": (lambda: weight_norm(nn.Linear(5, 3, bias=False)), (5,)),
    "weight norm of signals": (lambda: weight_norm(nn.Conv1d(3, 4, 2)), (3, 6)),
    "standardized": (lambda: convert(nn.Sequential(nn.Conv2d(2, 4, 2, groups=2)), "fedwon")[0], (2, 4, 4)),
}
"""Layers whose own code computes all clients: those with ``channelwise``, and parametrized weights."""


@pytest.mark.parametrize(("k", "training"), mostly_slow([(3, True), (3, False), (1, True)], (3, True)))
@pytest.mark.parametrize("name", [*LAYERS, *OWN_CODE])
def test_stacked_layer_matches_separate_layers(name, k, training):
    make, shape = (LAYERS | OWN_CODE)[name]
    torch.manual_seed(k)
    # The first layer makes the gradient of the layer's input part of the comparison.
    first = (
        nn.Linear(shape[0], shape[0])
        if len(shape) == 1
        else [nn.Conv1d, nn.Conv2d, nn.Conv3d][len(shape) - 2](shape[0], shape[0], 1)
    )
    net = nn.Sequential(first, make()).double().train(training)
    assert_program_matches(build_program(net), net, shape, k=k)


def test_tests_cover_every_layer():
    assert {type(make()) for make, _ in LAYERS.values()} == set(STACKED_LAYERS)
    assert {*FEATURE_LAYERS, *VIEW_LAYERS} <= set(STACKED_LAYERS)
    norms = [m for name in kinds() for m in vars(import_module(f"fedbn.norms.{name.replace('-', '_')}")).values()]
    declared = {m for m in norms if isinstance(m, type) and "channelwise" in vars(m)}
    assert declared <= {type(make()) for make, _ in OWN_CODE.values()}


@pytest.mark.parametrize("options", [{"dim": None}, {"dim": 1}])
def test_parametrization_that_mixes_rows_is_not_stacked_by_rows(options):
    with pytest.raises(Unstackable, match="ParametrizedLinear is not supported"):
        build_program(nn.Sequential(weight_norm(nn.Linear(3, 4), **options)))


def test_subclass_of_channelwise_layer_is_not_channelwise():
    """A subclass may compute something else, so it must declare it itself."""

    class Mixed(IABN):
        def forward(self, input):
            return super().forward(input) + input.mean(1, keepdim=True)

    with pytest.raises(Unstackable):
        build_program(nn.Sequential(Mixed(3)))

"""Lints find mistakes where they are and nowhere else, and do not change the model."""

import json
import sys
import types
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from torch import nn

from fedbn.auditing.audit import audit, audit_model
from fedbn.auditing.lints import LINTS
from fedbn.auditing.subject import EXAMPLES, measure
from fedbn.errors import UserError
from fedbn.models import build, models
from fedbn.nn.roles import Role, norm_layers, roles
from fedbn.strategies.base import NormStrategy, strategies, strategy
from fedbn.strategies.fedbn import FedBN
from fedbn.strategies.nonorm import NoNorm
from fedbn.strategies.ownership import LOCAL
from fedbn.strategies.silobn import SiloBN
from fedbn_simulations.report.audit import show

SHAPES = {"har-cnn": (6, 128), "stroke-cnn": (1, 24)}

NORMS_AFTER_LINEAR = {"mlp", "digit-cnn", "resmlp", "binary-mlp", "alexnet-cvgj", "vgg19-cvgj", "stroke-cnn"}


class BasicBlock(nn.Module):
    """Names as in torchvision."""

    def __init__(self, before, width, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(before, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU()
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = None
        if stride != 1 or before != width:
            self.downsample = nn.Sequential(nn.Conv2d(before, width, 1, stride, bias=False), nn.BatchNorm2d(width))

    def forward(self, x):
        h = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return self.relu(h + (x if self.downsample is None else self.downsample(x)))


class ResNet(nn.Module):
    """torchvision's layout of ResNet-18, where ``width`` is 64; smaller here where numbers do not matter."""

    def __init__(self, width=64, classes=1000):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        before = width
        for stage in range(1, 5):
            wide = width * 2 ** (stage - 1)
            stride = 1 if stage == 1 else 2
            setattr(self, f"layer{stage}", nn.Sequential(BasicBlock(before, wide, stride), BasicBlock(wide, wide, 1)))
            before = wide
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(before, classes)

    def forward(self, x):
        h = self.maxpool(torch.relu(self.bn1(self.conv1(x))))
        h = self.layer4(self.layer3(self.layer2(self.layer1(h))))
        return self.fc(self.avgpool(h).flatten(1))


def mobilenet():
    """Modules numbered like torchvision's MobileNet: no key contains ``bn``."""

    def block(before, after, stride=1, groups=1):
        conv = nn.Conv2d(before, after, 3, stride, 1, groups=groups, bias=False)
        return nn.Sequential(conv, nn.BatchNorm2d(after), nn.ReLU6())

    features = nn.Sequential(block(3, 8, 2), block(8, 8, groups=8), block(8, 16))
    return nn.Sequential(features, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4))


def small(*, norm=nn.BatchNorm2d, channels=4, **options):
    return nn.Sequential(
        nn.Conv2d(3, channels, 3, bias=False), norm(channels, **options), nn.Flatten(), nn.Linear(channels * 4, 2)
    )


class Named(nn.Module):
    """Sequential model with named modules."""

    def __init__(self, **layers):
        super().__init__()
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x):
        for layer in self.children():
            x = layer(x)
        return x


def findings(model, lint, strategy=None, **options):
    """Findings of one lint."""
    return [f for f in audit(model, strategy, **options).findings if f.lint == lint]


def only_finding(model, lint, strategy=None, **options):
    (finding,) = findings(model, lint, strategy, **options)
    assert finding.message
    assert finding.fix
    return finding


# --- names


def test_name_misses_in_torchvision_resnet18():
    with torch.device("meta"):
        net = ResNet()
    finding = only_finding(net, "name-misses")
    assert finding.where == ("layer2.0.downsample.1", "layer3.0.downsample.1", "layer4.0.downsample.1")
    assert "misses 3 of 20 BN layers" in finding.message
    parameters, statistics, counters = 11_689_512, 9_600, 20  # torchvision's
    assert audit(net).bytes == 4 * (parameters + statistics) + 8 * counters


def test_roles_include_all_norm_layers():
    net = ResNet(width=4)
    by_type = {k.rpartition(".")[0] for k, r in roles(net).items() if r is Role.AFFINE}
    assert len(by_type) == 20
    assert by_type == norm_layers(net).keys()
    shared = [e.key for e in audit(net, FedBN()).entries if e.bytes_up]
    assert not any(k.rpartition(".")[0] in by_type for k in shared)


def group_norm(groups):
    """Layers with this number of groups, for `small`."""
    return lambda channels: nn.GroupNorm(groups, channels)


def linear(layer):
    """A layer after a linear one of width four."""
    return nn.Sequential(nn.Linear(3, 4), layer)


def point():
    """BN over a single value per channel of an example of shape ``[3, 3, 3]``."""
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))


def biased():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.ReLU())


def after_head():
    return nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3), nn.Linear(3, 2), nn.InstanceNorm1d(2))


def subnet():
    return Named(subnet=nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)), fc=nn.Conv2d(4, 2, 1))


def sequence():
    return nn.Sequential(nn.Flatten(2), nn.Unflatten(2, (5,)), nn.Identity(), nn.Linear(5, 5), nn.BatchNorm1d(4))


class Reversed(nn.Module):
    """Registers the normalization layer after the head, but runs it before."""

    def __init__(self):
        super().__init__()
        self.fc, self.bn = nn.Linear(3, 2), nn.BatchNorm1d(3)

    def forward(self, x):
        return self.fc(self.bn(x))


@pytest.mark.parametrize(
    ("lint", "net", "options", "expected"),
    [
        (
            "name-misses",
            lambda: build("resnet20", (3, 32, 32), 10, 0),
            {},
            {"where": ("layer2.0.downsample.1", "layer3.0.downsample.1"), "message": "misses 2 of 21 BN layers"},
        ),
        ("name-misses", mobilenet, {}, {"message": "misses 3 of 3 BN layers"}),
        ("name-misses", lambda: Named(conv=nn.Conv2d(3, 4, 1), BN=nn.BatchNorm2d(4)), {}, {}),
        ("name-misses", lambda: small(norm=group_norm(2)), {}, {"message": "1 of 1 normalization layers"}),
        ("name-catches", subnet, {}, {"where": ("subnet.0",), "message": "catches 2 entries of 1 layer without"}),
        ("no-norm", lambda: nn.Linear(3, 2), {}, {"level": "warning"}),
        ("no-norm", lambda: nn.Linear(3, 2), {"strategy": NoNorm()}, {"level": "note"}),
        ("counters", small, {}, {"message": "1 integer entry (8 B)"}),
        ("momentum-none", lambda: small(momentum=None), {}, {"where": ("1",)}),
        ("parameters-only", small, {}, {"message": "omits 2 statistics (32 B): FedAvg on parameters() is SiloBN"}),
        ("untracked", lambda: small(track_running_stats=False), {}, {"where": ("1",)}),
        ("one-value", point, {"shape": (3, 3, 3)}, {"level": "warning"}),
        ("one-value", point, {"shape": (3, 3, 3), "batch_size": 1}, {"level": "error"}),
        ("one-value", lambda: linear(nn.BatchNorm1d(4)), {}, {"where": ("1",)}),
        ("one-value", sequence, {}, {}),
        ("batch-of-one", small, {"batch_size": 1}, {}),
        (
            "fewest-values",
            small,
            {"batch_size": 8, "shape": (3, 4, 4)},
            {"message": "32 values per channel at batch size 8, 4 in a last batch of one"},
        ),
        ("unmeasured", small, {"shape": (5, 4, 4)}, {"message": str([EXAMPLES, 5, 4, 4])}),
        ("group-is-instance", lambda: small(norm=group_norm(4)), {}, {"where": ("1",)}),
        ("group-is-layer", lambda: small(norm=group_norm(1)), {}, {"level": "note"}),
        ("group-of-one", lambda: linear(nn.GroupNorm(4, 4)), {"shape": (3,)}, {"level": "error"}),
        ("idle-bias", biased, {}, {"where": ("0",), "message": "(16 B)"}),
        ("idle-bias", lambda: nn.Sequential(biased()), {}, {"where": ("0.0",)}),
        ("sync", lambda: nn.SyncBatchNorm.convert_sync_batchnorm(small()), {}, {"where": ("1",)}),
        ("after-head", after_head, {}, {"where": ("3",)}),
        ("after-head", Reversed, {}, {}),
    ],
)
def test_lint_finds_mistake(lint, net, options, expected):
    finding = only_finding(net(), lint, **options)
    assert expected.pop("message", "") in finding.message
    assert {name: getattr(finding, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("lint", "net", "options"),
    [
        ("name-misses", lambda: Named(conv=nn.Conv2d(3, 4, 1), bn=nn.BatchNorm2d(4)), {}),
        ("name-catches", lambda: Named(conv=nn.Conv2d(3, 4, 1), bn=nn.BatchNorm2d(4)), {}),
        ("name-misses", subnet, {}),
        ("no-norm", small, {}),
        ("counters", lambda: small(norm=group_norm(2)), {}),
        ("momentum-none", small, {}),
        ("parameters-only", lambda: small(track_running_stats=False), {}),
        ("untracked", small, {}),
        ("untracked", lambda: small(norm=nn.InstanceNorm2d), {}),
        ("one-value", small, {"shape": (3, 4, 4)}),
        ("one-value", small, {}),
        ("one-value", sequence, {"shape": (4, 5)}),
        ("batch-of-one", small, {"batch_size": 2}),
        ("batch-of-one", lambda: small(norm=group_norm(2)), {"batch_size": 1}),
        ("fewest-values", small, {}),
        ("unmeasured", small, {"shape": (3, 4, 4)}),
        ("group-is-instance", lambda: small(norm=group_norm(2)), {}),
        ("group-is-layer", lambda: small(norm=group_norm(2)), {}),
        ("group-of-one", lambda: linear(nn.GroupNorm(2, 4)), {"shape": (3,)}),
        ("conversion-raises", lambda: small(channels=64), {}),
        ("conversion-degenerates", lambda: small(channels=64), {}),
        ("idle-bias", small, {}),
        ("idle-bias", lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4)), {}),
        ("sync", small, {}),
        ("after-head", lambda: after_head()[:3], {}),
        ("after-head", Reversed, {"shape": (3,)}),
    ],
)
def test_lint_accepts_correct_model(lint, net, options):
    assert not findings(net(), lint, **options)


def test_lazy_finding():
    net = nn.Sequential(nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d(), nn.Flatten(), nn.LazyLinear(2))
    result = audit(net, FedBN(), shape=(3, 8, 8))
    assert [f.lint for f in result.findings if f.level == "error"] == ["lazy"]
    assert result.entries[0].shape is None
    assert result.bytes == 8  # the counter
    net(torch.zeros(2, 3, 8, 8))
    assert not findings(net, "lazy")


def test_parameters_only_matches_silobn():
    net = ResNet(width=4)
    omitted = {k for k in net.state_dict() if k not in dict(net.named_parameters())}
    assert omitted == {e.key for e in audit(net, SiloBN()).entries if not e.bytes_up}


def test_untrained_finding():
    net = nn.Sequential(small(), nn.BatchNorm1d(2))
    assert only_finding(net, "untrained").level == "note"
    net[0](torch.randn(2, 3, 4, 4))
    finding = only_finding(net, "untrained")
    assert (finding.level, finding.where) == ("warning", ("1",))
    net(torch.randn(2, 3, 4, 4))
    assert not findings(net, "untrained")


@pytest.mark.parametrize(
    ("entry", "value", "message"),
    [
        ("running_var", -1e-9, "1 negative variance"),
        ("running_var", float("nan"), "1 NaN or infinite value"),
        ("running_mean", float("inf"), "1 NaN or infinite value"),
    ],
)
def test_broken_statistics_finding(entry, value, message):
    net = small()
    assert not findings(net, "broken-statistics")
    net[1].running_var.zero_()
    assert not findings(net, "broken-statistics")
    getattr(net[1], entry)[2] = value
    finding = only_finding(net, "broken-statistics")
    assert (finding.level, finding.where) == ("error", ("1",))
    assert message in finding.message


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_statistics_finding(dtype):
    net = small().to(dtype)
    assert only_finding(net, "half-statistics").where == ("1",)
    net[1].float()
    assert not findings(net, "half-statistics")


def test_measure_uses_minimum_for_reused_layer():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn = nn.BatchNorm2d(3)

        def forward(self, x):
            return self.bn(self.bn(x)[..., :1, :1])

    assert measure(Twice(), (3, 4, 4)).values == {"bn": 1}


def test_conversion_findings():
    net = nn.Sequential(*(nn.BatchNorm2d(c) for c in (16, 32, 48, 64, 80)))
    assert only_finding(net, "conversion-raises").where == ("2", "4")
    assert "(C = 48, 80)" in only_finding(net, "conversion-raises").message
    assert "(C = 16, 32)" in only_finding(net, "conversion-degenerates").message
    for layer in net:
        groups = min(32, layer.num_features)
        if layer.num_features in (48, 80):
            with pytest.raises(ValueError, match="divisible"):
                nn.GroupNorm(groups, layer.num_features)
        else:
            nn.GroupNorm(groups, layer.num_features)


def test_tied_finding():
    net = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 3))
    assert not findings(net, "tied")
    net[2].weight = net[0].weight
    assert only_finding(net, "tied").where == ("0.weight", "2.weight")
    assert only_finding(net, "tied").level == "warning"

    class PersonalHead(NormStrategy):
        name = "personal-head"
        head = LOCAL

    assert only_finding(net, "tied", PersonalHead()).level == "error"


def test_tied_findings_for_shared_module():
    shared = nn.BatchNorm1d(3)
    net = nn.Sequential(nn.Linear(3, 3), shared, nn.Linear(3, 3), shared)
    result = audit(net, FedBN(), shape=(3,))
    assert len([f for f in result.findings if f.lint == "tied"]) == 5
    assert {e.key for e in result.entries} == net.state_dict().keys()
    assert {e.owner for e in result.entries if e.layer in ("1", "3")} == {"local"}
    assert net[1] is net[3]


def test_one_value_and_group_of_one_match_torch():
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        point()(torch.zeros(1, 3, 3, 3))
    assert linear(nn.GroupNorm(4, 4))(torch.randn(5, 3)).abs().max() < 1e-3


# --- all lints


def problematic():
    """Model with many problems."""
    net = nn.Sequential(
        nn.Conv2d(3, 4, 1),
        nn.BatchNorm2d(4, momentum=None),
        nn.Dropout(0.5),
        nn.BatchNorm2d(4, track_running_stats=False),
        nn.GroupNorm(4, 4),
        nn.SyncBatchNorm(4),
        nn.InstanceNorm2d(4, track_running_stats=True),
        nn.Flatten(),
        nn.Linear(16, 16),
        nn.BatchNorm1d(16),
    )
    net[9].running_var[3] = float("nan")
    net[2].eval()
    net[1].eval()
    return net


def state_bytes(model):
    return {k: v.numpy().tobytes() for k, v in model.state_dict().items()}


def test_audit_does_not_change_model():
    net = problematic()
    handles = [len(m._forward_pre_hooks) for m in net.modules()]
    before, modes, rng_state = state_bytes(net), [m.training for m in net.modules()], torch.get_rng_state()
    result = audit(net, shape=(3, 2, 2))
    assert len({f.lint for f in result.findings}) >= 12
    assert state_bytes(net) == before
    assert [m.training for m in net.modules()] == modes
    assert [len(m._forward_pre_hooks) for m in net.modules()] == handles
    assert torch.equal(torch.get_rng_state(), rng_state)
    assert all(p.grad is None for p in net.parameters())


def test_audit_supports_custom_norm_layers():
    class CustomNorm(nn.Module):
        normalizes = True

        def __init__(self):
            super().__init__()
            self.register_buffer("running_mean", torch.zeros(3))

        def forward(self, x):
            return x - self.running_mean

    net = nn.Sequential(nn.Linear(3, 3), CustomNorm(), nn.Linear(3, 2))
    assert only_finding(net, "name-misses", FedBN(), shape=(3,)).where == ("1",)
    net[1].running_mean[0] = float("nan")
    assert findings(net, "broken-statistics")


def test_audit_sorts_findings_by_severity():
    levels = [f.level for f in audit(problematic(), shape=(3, 2, 2)).findings]
    assert levels == sorted(levels, key=["error", "warning", "note"].index)
    assert set(levels) == {"error", "warning", "note"}


def test_lints_are_complete():
    import fedbn.auditing.lints as module

    lints = [f for f in vars(module).values() if getattr(f, "__annotations__", {}).get("return") == "Iterator[Finding]"]
    assert set(lints) == set(LINTS)


@settings(max_examples=25, deadline=None)
@given(
    widths=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    affine=st.booleans(),
    tracked=st.booleans(),
    dtype=st.sampled_from([torch.float16, torch.float32, torch.float64]),
    name=st.sampled_from(["global-naive", "fedbn", "silobn", "fedbn-seeded", "local"]),
)
def test_audit_bytes_sum_to_state_size(widths, affine, tracked, dtype, name):
    layers = []
    for before, after in zip([3, *widths], widths):
        layers += [nn.Linear(before, after), nn.BatchNorm1d(after, affine=affine, track_running_stats=tracked)]
    net = nn.Sequential(*layers, nn.Linear(widths[-1], 2)).to(dtype)
    result = audit(net, strategy(name))
    state = net.state_dict()
    assert [e.key for e in result.entries] == list(state)
    assert [e.bytes for e in result.entries] == [v.nbytes for v in state.values()]
    assert result.bytes == sum(v.nbytes for v in state.values()) == sum(r["bytes"] for r in result.totals)
    assert result.bytes_up == sum(r["bytes_up"] for r in result.totals)
    assert result.bytes_down == sum(r["bytes_down"] for r in result.totals)


def model_and_strategy():
    """Pairs of a model and a strategy: all strategies with a small network, and strategies that treat it differently.

    Strategies that keep the layers differ in the owners of entries, not in what is measured, and two of them suffice.
    """
    changing = (n for n, cls in strategies().items() if cls.prepare_model is not NormStrategy.prepare_model)
    differing = [None, "fedbn", *changing]
    found = [("small-cnn", name) for name in [None, *strategies()]]
    for model in models():
        if model.endswith("-cvgj"):  # large networks
            pairs = [(model, name) for name in (None, "fedbn", "groupnorm", "hbn", "instancenorm", "fedwon")]
        else:
            pairs = [(model, name) for name in differing if model != "small-cnn"]
        found += [pytest.param(*pair, marks=() if model == "mlp" else pytest.mark.slow) for pair in pairs]
    return found


@pytest.mark.parametrize(("name", "strategy_text"), model_and_strategy())
def test_audit_model_for_models_and_strategies(name, strategy_text):
    shape = SHAPES.get(name, (3, 28, 28))
    if strategy_text in ("fedwon", "weight-standardization") and name in ("mlp", "resmlp", "binary-mlp"):
        pytest.skip("requires convolutions")
    if strategy_text == "feature-norm" and name == "unet":
        pytest.skip("requires a linear classifier")
    result = audit_model(name, strategy_text, shape, 10)
    assert result.model == name
    assert result.strategy == (strategy_text or "global-naive")
    linear_bn = strategy_text == "instancenorm" and name in NORMS_AFTER_LINEAR
    assert any(f.lint == "unmeasured" for f in result.findings) == linear_bn
    assert not [f for f in result.findings if f.level == "error"]
    text = json.dumps(result.as_dict(), allow_nan=False)
    assert json.loads(text)["bytes"] == result.bytes


def test_audit_to_pandas():
    frame = audit(small(), FedBN()).to_pandas()
    assert frame.loc["1.running_var", "role"] == "statistics"
    assert frame["bytes"].sum() == audit(small()).bytes


# --- bad input


@pytest.fixture
def user_module(monkeypatch):
    """A user's module with valid and invalid factories."""
    module = types.ModuleType("user_models")

    def needs_depth(shape, classes, depth):
        return small()

    def fails(shape, classes):
        raise RuntimeError("no weights here")

    module.plain = lambda: small()
    module.shaped = lambda shape, classes: nn.Sequential(nn.Linear(shape[0], classes), nn.BatchNorm1d(classes))
    module.keywords = lambda **options: small()
    module.needs_depth, module.fails, module.number = needs_depth, fails, 3
    module.a_model = small()
    module.no_model = lambda: "net"
    module.normless = lambda: nn.Linear(3, 2)
    module.lazy = lambda: nn.Sequential(nn.LazyLinear(2), nn.LazyBatchNorm1d())
    monkeypatch.setitem(sys.modules, "user_models", module)
    return module


def test_audit_model_accepts_user_factories(user_module):
    assert audit_model("user_models:plain").entries
    assert audit_model("user_models:keywords", "groupnorm:groups=2", (3, 4, 4)).strategy == "groupnorm:groups=2"
    assert audit_model("user_models:shaped", "fedbn", (7,), 3).entries[0].shape == (3, 7)


@pytest.mark.parametrize(
    ("text", "strategy_text", "shape", "message"),
    [
        ("resnet21", None, (3, 32, 32), "Did you mean 'resnet20'"),
        ("resnet20", "fedbm", (3, 32, 32), "Did you mean 'fedbn'"),
        ("resnet20", None, None, "needs the shape of an example"),
        ("resnet20", None, (6, 128), r"resnet20 takes images"),
        ("resnet20", None, (3, 0, 32), "at least|images"),
        ("no_such_package:net", None, None, "cannot import 'no_such_package'"),
        (":net", None, None, "package.module:name"),
        ("user_models:plane", None, None, "Did you mean 'plain'"),
        ("user_models:number", None, None, "package.module:factory"),
        ("user_models:a_model", None, None, "is a model, not a factory"),
        ("user_models:needs_depth", None, (3, 4, 4), "needs depth: give defaults"),
        ("user_models:shaped", None, None, "needs the shape of an example"),
        ("user_models:fails", None, (3, 4, 4), "RuntimeError: no weights here"),
        ("user_models:no_model", None, None, "returned a str"),
        ("user_models:normless", "fedbn", None, "works on running statistics"),
        ("user_models:normless", "groupnorm", None, "replaces layers with batch statistics and Linear has none"),
        ("user_models:lazy", "groupnorm", None, "run one batch"),
    ],
)
def test_audit_model_rejects_bad_input(user_module, text, strategy_text, shape, message):
    with pytest.raises(UserError, match=message):
        audit_model(text, strategy_text, shape)


def test_audit_model_rejects_module_with_syntax_error(tmp_path, monkeypatch):
    (tmp_path / "half_written.py").write_text("def net(:\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match="SyntaxError"):
        audit_model("half_written:net")


@pytest.mark.parametrize(
    ("options", "message"),
    [({"batch_size": 0}, "batch size 0"), ({"shape": (3, 0)}, "is empty"), ({"shape": ()}, "is empty")],
)
def test_audit_rejects_bad_input(options, message):
    with pytest.raises(UserError, match=message):
        audit(small(), **options)


def test_audit_rejects_extra_state():
    class Extra(nn.Linear):
        def get_extra_state(self):
            return torch.zeros(1)

        def set_extra_state(self, state):
            pass

    with pytest.raises(UserError, match="_extra_state"):
        audit(nn.Sequential(Extra(2, 2)))


# --- terminal report


def render_text(result, **options):
    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    show(result, console, **options)
    return console.export_text()


def test_show_fits_width_and_collapses_blocks():
    with torch.device("meta"):
        net = ResNet()
    result = audit(net, FedBN())
    text = render_text(result)
    assert all(len(line) <= 80 for line in text.splitlines())
    assert "layer1.[0-1].bn1" in text
    assert "layer2.0.downsample.1" in text
    assert "misses 3 of 20 BN layers" in " ".join(text.split())
    assert "fix: " in text
    assert len(text.splitlines()) < 90


def test_show_full_lists_every_entry():
    result = audit(ResNet(width=4), FedBN())
    text = render_text(result, full=True)
    lines = text.splitlines()
    assert all(any(line.split()[:1] == [e.key] for line in lines) for e in result.entries)
    assert all(len(line) <= 80 for line in lines)
    assert " and 16 more" in render_text(result)
    assert " more" not in text


def test_show_does_not_collapse_different_blocks():
    widths = (3, 3, 3, 4, 4, 2)
    text = render_text(audit(nn.Sequential(*(nn.Linear(a, b) for a, b in pairwise(widths)))))
    assert [line.split()[0] for line in text.splitlines() if "shared" in line][:4] == ["[0-1]", "2", "3", "4"]


def test_show_sums_bytes_of_collapsed_blocks():
    net = nn.Sequential(nn.Sequential(*(nn.Linear(8, 8, bias=False) for _ in range(4))), nn.BatchNorm1d(8))
    text = render_text(audit(net))
    assert "0.[0-2]" in text  # the last one is the head
    assert f"{3 * 8 * 8 * 4} B" in text


def test_show_without_findings_or_names():
    assert "No findings." in render_text(audit(Named(bn_a=nn.GroupNorm(2, 4))))
    assert "the model itself" in render_text(audit(nn.BatchNorm2d(4)))

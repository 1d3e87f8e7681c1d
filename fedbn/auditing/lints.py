"""The lints of `fedbn.auditing.audit`: each checks for one common mistake in averaging normalized networks.

A lint takes a `Subject` and yields findings. No lint changes the model. Properties that cannot be derived from module
types are measured on a copy with a small batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.parameter import is_lazy

from fedbn.auditing.subject import Subject
from fedbn.models.inspection import EXAMPLES, head_notice
from fedbn.nn.conversion import channels_of
from fedbn.nn.plain import copy_model
from fedbn.nn.roles import Role, head, keeps_statistics, statistics_layers
from fedbn.statistics.mismatch import LARGE_GAP, REMEDY, outputs_in_both_modes
from fedbn.strategies.base import StatelessNorm

Level = Literal["error", "warning", "note"]
LEVELS: tuple[Level, ...] = ("error", "warning", "note")


@dataclass(frozen=True)
class Finding:
    """A problem found by a lint.

    Attributes:
        level: ``error`` for a failure or wrong numbers, ``warning`` for the same under common settings, ``note`` for
            information.
        lint: name of the lint.
        where: affected layers or keys, in the model's order; empty for the whole model.
        message: description of the problem.
        fix: suggested fix.
    """

    level: Level
    lint: str
    where: tuple[str, ...]
    message: str
    fix: str


Lint = Callable[[Subject], Iterator[Finding]]


def _layers(keys: list[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(k.rpartition(".")[0] or k for k in keys))


def _count(n: int, noun: str, plural: str | None = None) -> str:
    return f"{n:,} {noun if n == 1 else plural or noun + 's'}"


def _no_norm(s: Subject) -> Iterator[Finding]:
    if not s.norms:
        message = "no normalization layer: every normalization strategy is plain FedAvg here"
        fix = "choose a model with normalization layers"
        yield Finding("note" if isinstance(s.strategy, StatelessNorm) else "warning", "no-norm", (), message, fix)


def _lazy(s: Subject) -> Iterator[Finding]:
    if s.lazy:
        count = _count(len(s.lazy), "entry", "entries")
        message = f"{count} of lazy layers without a shape: they cannot be sent or counted"
        yield Finding("error", "lazy", _layers(s.lazy), message, "run one batch through the model before training")


def _name_misses(s: Subject) -> Iterator[Finding]:
    if missed := _layers([k for k in s.norm_keys if "bn" not in k]):
        noun = "BN layers" if s.batch_norms.keys() == s.norms.keys() else "normalization layers"
        message = (
            f"name matching ('bn' in key) misses {len(missed)} of {len(_layers(s.norm_keys))} {noun}: they "
            "would be averaged by accident"
        )
        fix = "select entries by module type: fedbn.nn.roles.roles(model)"
        yield Finding("warning", "name-misses", missed, message, fix)


def _name_catches(s: Subject) -> Iterator[Finding]:
    norm = set(s.norm_keys)
    if caught := [k for k in s.state if "bn" in k and k not in norm]:
        where = _layers(caught)
        entries = _count(len(caught), "entry", "entries")
        message = (
            f"name matching ('bn' in key) catches {entries} of {_count(len(where), 'layer')} without "
            "normalization: they would stay local by accident"
        )
        fix = "select entries by module type: fedbn.nn.roles.roles(model)"
        yield Finding("warning", "name-catches", where, message, fix)


def _counters(s: Subject) -> Iterator[Finding]:
    if counters := s.keys(Role.COUNTER):
        entries = _count(len(counters), "integer entry", "integer entries")
        message = (
            f"{entries} ({s.size(counters):,} B): FedAvg over the whole state dict turns them into "
            "fractions, or into zeros if it casts the weight to an integer"
        )
        yield Finding("note", "counters", _layers(counters), message, "keep integers local, as all strategies here do")


def _cumulative(s: Subject) -> Iterator[Finding]:
    tracked = {p: m for p, m in s.norms.items() if keeps_statistics(m)}
    if where := tuple(p for p, m in tracked.items() if getattr(m, "momentum", 0.1) is None):
        message = (
            f"{_count(len(where), 'layer')} with momentum=None: the counter weights the running average, so "
            "an averaged or reset counter corrupts it; after n batches the next batch has weight 1/n"
        )
        yield Finding("warning", "momentum-none", where, message, "use momentum=0.1, or recalibrate before evaluating")


def _parameters_only(s: Subject) -> Iterator[Finding]:
    if keys := s.keys(Role.STATISTICS):
        message = (
            f"averaging parameters() omits {_count(len(keys), 'statistic')} ({s.size(keys):,} B): FedAvg on "
            "parameters() is SiloBN here, and a new client starts from (0, 1)"
        )
        fix = "choose a strategy: silobn keeps statistics local, the global strategies share them"
        yield Finding("note", "parameters-only", _layers(keys), message, fix)


def _untracked(s: Subject) -> Iterator[Finding]:
    if where := tuple(p for p, m in s.batch_norms.items() if m.running_mean is None):
        message = (
            f"{_count(len(where), 'BN layer')} without running statistics: there is nothing to share, and evaluation "
            "normalizes by the test batch, so a prediction depends on the other examples"
        )
        yield Finding("warning", "untracked", where, message, "set track_running_stats=True, or use groupnorm")


def _untrained(s: Subject) -> Iterator[Finding]:
    tracked = {p: m for p, m in s.batch_norms.items() if s.readable(m)}
    fresh = tuple(p for p, m in tracked.items() if not m.num_batches_tracked)
    if fresh:
        others_trained = len(fresh) < len(tracked)
        message = (
            f"{len(fresh)} of {_count(len(tracked), 'BN layer')} with counter 0: untrained statistics, mean "
            f"0 and variance 1, would be used in eval mode{', while others are trained' if others_trained else ''}"
        )
        fix = "train or recalibrate before evaluation; if statistics were loaded, load their counter too"
        yield Finding("warning" if others_trained else "note", "untrained", fresh, message, fix)


def _broken(s: Subject) -> Iterator[Finding]:
    for path, layer in s.norms.items():
        if not s.readable(layer):
            continue
        statistics = dict(layer.named_buffers(recurse=False))
        faults = []
        if negative := sum(int((t < 0).sum()) for n, t in statistics.items() if n == "running_var"):
            faults.append(_count(negative, "negative variance"))
        if non_finite := sum(int((~t.isfinite()).sum()) for t in statistics.values()):
            faults.append(_count(non_finite, "NaN or infinite value"))
        if faults:
            message = f"running statistics with {' and '.join(faults)}: eval mode breaks"
            fix = "recalibrate; do not apply adaptive server steps or noise to statistics"
            yield Finding("error", "broken-statistics", (path,), message, fix)


def _half(s: Subject) -> Iterator[Finding]:
    half = (torch.float16, torch.bfloat16)
    if keys := [k for k in s.keys(Role.STATISTICS) if s.state[k].dtype in half]:
        message = f"{_count(len(keys), 'statistic')} in half precision: small updates are rounded away"
        fix = "keep normalization layers in float32: layer.float()"
        yield Finding("warning", "half-statistics", _layers(keys), message, fix)


def _unmeasured(s: Subject) -> Iterator[Finding]:
    if s.measured.failure:
        shape = [EXAMPLES, *(s.shape or ())]
        message = f"the model does not run on a batch of shape {shape} in training mode: {s.measured.failure}"
        yield Finding("warning", "unmeasured", (), message, "specify the shape of one example that the model accepts")


def _one_value(s: Subject) -> Iterator[Finding]:
    if s.measured.values:
        where = tuple(p for p in s.batch_norms if s.measured.values.get(p) == 1)
    else:
        where = tuple(p for _, left, p, _ in s.pairs if isinstance(left, nn.Linear) and p in s.batch_norms)
    layers = _count(len(where), "BN layer sees", "BN layers see")
    if where and s.batch_size == 1:
        message = f"{layers} one value per channel at batch size 1: training raises"
        yield Finding("error", "one-value", where, message, "use a batch size of at least 2, or groupnorm")
    elif where:
        message = (
            f"{layers} one value per channel and example: a last batch of one raises, and so does a client "
            "with a single example"
        )
        fix = "merge a last batch of one into the previous batch (training here does) or drop it"
        yield Finding("warning", "one-value", where, message, fix)


def _batch_of_one(s: Subject) -> Iterator[Finding]:
    if s.batch_size == 1 and s.batch_norms:
        message = "batches of one: BN trains with the moments of single examples but evaluates with their average"
        yield Finding("warning", "batch-of-one", tuple(s.batch_norms), message, "use larger batches, or groupnorm")


def _fewest_values(s: Subject) -> Iterator[Finding]:
    values = {p: v for p, v in s.measured.values.items() if p in s.batch_norms}
    if values:
        path = min(values, key=lambda p: values[p])
        message = (
            f"{values[path] * s.batch_size:,} values per channel at batch size {s.batch_size}, "
            f"{values[path]:,} in a last batch of one: the fewest of all BN layers"
        )
        fix = "use larger batches if that is too few to estimate a mean and a variance"
        yield Finding("note", "fewest-values", (path,), message, fix)


def _groups(s: Subject) -> Iterator[Finding]:
    layers = {p: m for p, m in s.norms.items() if isinstance(m, nn.GroupNorm)}
    if constant := tuple(p for p in layers if s.measured.values.get(p) == 1):
        message = (
            f"{_count(len(constant), 'GroupNorm layer')} with one value per group: the output is the shift, "
            "for any input"
        )
        yield Finding("error", "group-of-one", constant, message, "use fewer groups")
    if instance := tuple(p for p, m in layers.items() if m.num_groups == m.num_channels):
        message = f"{_count(len(instance), 'GroupNorm layer')} with one channel per group: this is InstanceNorm"
        fix = "use fewer groups, with two to sixteen channels each"
        yield Finding("warning", "group-is-instance", instance, message, fix)
    if single := tuple(p for p, m in layers.items() if m.num_groups == 1 < m.num_channels):
        message = f"{_count(len(single), 'GroupNorm layer')} with one group: this is LayerNorm"
        yield Finding("note", "group-is-layer", single, message, "use more groups unless this is intended")


def _conversion(s: Subject) -> Iterator[Finding]:
    channels = {p: channels_of(m) for p, m in s.batch_norms.items()}
    for lint, effect, where in (
        ("conversion-raises", "raise", [p for p, c in channels.items() if c > 32 and c % 32]),
        ("conversion-degenerates", "be InstanceNorm", [p for p, c in channels.items() if 0 < c <= 32]),
    ):
        if where:
            widths = ", ".join(map(str, sorted({channels[p] for p in where})))
            message = f"GroupNorm(min(32, C), C) would {effect} for {_count(len(where), 'BN layer')} (C = {widths})"
            fix = "use fedbn.nn.conversion.convert(model, 'group', groups=8), which selects the nearest divisor"
            yield Finding("note", lint, tuple(where), message, fix)


def _idle_bias(s: Subject) -> Iterator[Finding]:
    biases = {
        path: left.bias
        for path, left, _, right in s.pairs
        if isinstance(left, (_ConvNd, nn.Linear)) and isinstance(right, (_BatchNorm, _InstanceNorm))
        if left.bias is not None and not is_lazy(left.bias)
    }
    if biases:
        size = sum(b.numel() * b.element_size() for b in biases.values())
        message = f"{_count(len(biases), 'bias', 'biases')} canceled by the next normalization layer ({size:,} B)"
        yield Finding("note", "idle-bias", tuple(biases), message, "set bias=False in these layers")


def _synchronized(s: Subject) -> Iterator[Finding]:
    if where := tuple(p for p, m in s.norms.items() if isinstance(m, nn.SyncBatchNorm)):
        message = (
            f"{_count(len(where), 'SyncBatchNorm layer')}: synchronization works within a torch process "
            "group, which federated clients do not form, so each would normalize by its own batch"
        )
        fix = "use BatchNorm; with global-recalibrated, clients share exact statistics"
        yield Finding("warning", "sync", where, message, fix)


def _tied(s: Subject) -> Iterator[Finding]:
    tensors: dict[object, list[str]] = {}
    for key, value in s.state.items():
        has_storage = not is_lazy(value) and value.numel() > 0 and value.data_ptr() != 0
        tensor = (value.device, value.data_ptr(), value.shape, value.stride()) if has_storage else id(value)
        tensors.setdefault(tensor, []).append(key)
    for keys in tensors.values():
        owners = dict.fromkeys(str(s.ownership.owner(k)) for k in keys)
        if len(owners) > 1:
            message = (
                f"one tensor under {len(keys)} keys with different owners ({', '.join(owners)}): the last one "
                "loaded wins"
            )
            fix = "untie the layers, or choose a strategy with one owner for both roles"
            yield Finding("error", "tied", tuple(keys), message, fix)
        elif len(keys) > 1:
            message = f"one tensor under {len(keys)} keys: counted, sent and averaged {len(keys)} times"
            yield Finding("warning", "tied", tuple(keys), message, "untie the layers, or register the tensor once")


def _ambiguous_head(s: Subject) -> Iterator[Finding]:
    if notice := head_notice(s.model):
        fix = "name the layers of the head with --head (head= in Python)"
        yield Finding("warning", "ambiguous-head", head(s.model), notice, fix)


def _after_head(s: Subject) -> Iterator[Finding]:
    order = s.measured.order or tuple(p for p, _ in s.model.named_modules())
    last = max((order.index(p) for p in head(s.model) if p in order), default=len(order))
    where = tuple(p for p in order[last + 1 :] if p in s.norms)
    if where:
        message = (
            f"{_count(len(where), 'normalization layer')} after {order[last]!r}, the last weighted layer and so the "
            "head: either logits are normalized, or this layer is not the classifier"
        )
        fix = "do not normalize the output of the classifier, or name the classifier with --head"
        yield Finding("warning", "after-head", where, message, fix)


def _mismatch(s: Subject) -> Iterator[Finding]:
    if s.data is None or s.lazy or not statistics_layers(s.model):
        return
    x, y = s.data
    model = copy_model(s.model)
    batch, served = (
        float((out.argmax(1) == y).double().mean()) for out in outputs_in_both_modes(model, x, s.batch_size)
    )
    if batch - served > LARGE_GAP:
        message = f"accuracy on training data is {batch:.3f} with batch statistics and {served:.3f} with running ones"
        yield Finding("warning", "mismatch", (), message, REMEDY)


LINTS: tuple[Lint, ...] = (
    _no_norm,
    _lazy,
    _broken,
    _half,
    _tied,
    _unmeasured,
    _one_value,
    _batch_of_one,
    _groups,
    _synchronized,
    _untracked,
    _cumulative,
    _name_misses,
    _name_catches,
    _ambiguous_head,
    _after_head,
    _untrained,
    _counters,
    _parameters_only,
    _fewest_values,
    _conversion,
    _idle_bias,
    _mismatch,
)

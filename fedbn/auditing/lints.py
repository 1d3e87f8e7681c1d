"""The lints of `fedbn.auditing.audit`: each looks at a model for one trap of averaging normalized networks.

A lint reads a `Subject` and yields findings; none changes the model. What cannot be read off types is measured
on a copy with a tiny batch.
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

from fedbn.auditing.subject import EXAMPLES, Subject
from fedbn.nn.conversion import channels_of
from fedbn.nn.roles import Role, head, keeps_statistics
from fedbn.strategies.base import StatelessNorm

Level = Literal["error", "warning", "note"]
LEVELS: tuple[Level, ...] = ("error", "warning", "note")


@dataclass(frozen=True)
class Finding:
    """A trap in this model.

    Attributes:
        level: ``error`` fails or gives wrong numbers, ``warning`` does under common choices, ``note`` is
            good to know.
        lint: which lint found it.
        where: the layers or keys concerned, in the model's order; empty for the whole model.
        message: what is the matter.
        fix: what to do.
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
        yield Finding(
            "note" if isinstance(s.strategy, StatelessNorm) else "warning",
            "no-norm",
            (),
            "no normalization layer: every treatment of normalization is plain FedAvg here",
            "choose a model that normalizes, or compare other things",
        )


def _lazy(s: Subject) -> Iterator[Finding]:
    if s.lazy:
        count = _count(len(s.lazy), "entry", "entries")
        yield Finding(
            "error",
            "lazy",
            _layers(s.lazy),
            f"{count} of lazy layers without a shape: nothing can be sent or counted",
            "run one batch through the model before federating it",
        )


def _name_misses(s: Subject) -> Iterator[Finding]:
    if missed := _layers([k for k in s.norm_keys if "bn" not in k]):
        noun = "BN layers" if s.batch_norms.keys() == s.norms.keys() else "normalization layers"
        yield Finding(
            "warning",
            "name-misses",
            missed,
            f"name matching ('bn' in key) misses {len(missed)} of {len(_layers(s.norm_keys))} {noun}: they "
            "would be averaged by accident",
            "choose entries by module type: fedbn.nn.roles.roles(model)",
        )


def _name_catches(s: Subject) -> Iterator[Finding]:
    norm = set(s.norm_keys)
    if caught := [k for k in s.state if "bn" in k and k not in norm]:
        where = _layers(caught)
        entries = _count(len(caught), "entry", "entries")
        yield Finding(
            "warning",
            "name-catches",
            where,
            f"name matching ('bn' in key) catches {entries} of {_count(len(where), 'layer')} that normalize "
            "nothing: they would stay local by accident",
            "choose entries by module type: fedbn.nn.roles.roles(model)",
        )


def _counters(s: Subject) -> Iterator[Finding]:
    if counters := s.keys(Role.COUNTER):
        entries = _count(len(counters), "integer entry", "integer entries")
        yield Finding(
            "note",
            "counters",
            _layers(counters),
            f"{entries} ({s.size(counters):,} B): FedAvg over the whole state dict makes fractions of "
            "them, or zeros where it casts the weight to integer",
            "keep integers local, as every strategy here does",
        )


def _cumulative(s: Subject) -> Iterator[Finding]:
    tracked = {p: m for p, m in s.norms.items() if keeps_statistics(m)}
    if where := tuple(p for p, m in tracked.items() if getattr(m, "momentum", 0.1) is None):
        yield Finding(
            "warning",
            "momentum-none",
            where,
            f"{_count(len(where), 'layer')} with momentum=None: the counter weighs the running average, so "
            "an averaged or reset counter corrupts it; after n batches the next counts 1/n only",
            "use momentum=0.1, or recalibrate before evaluating",
        )


def _parameters_only(s: Subject) -> Iterator[Finding]:
    if keys := s.keys(Role.STATISTICS):
        yield Finding(
            "note",
            "parameters-only",
            _layers(keys),
            f"averaging parameters() leaves {_count(len(keys), 'statistic')} ({s.size(keys):,} B) behind: "
            "FedAvg on parameters() is SiloBN here, and a fresh client has (0, 1)",
            "decide it: silobn keeps statistics local, the global strategies share them",
        )


def _untracked(s: Subject) -> Iterator[Finding]:
    if where := tuple(p for p, m in s.batch_norms.items() if m.running_mean is None):
        yield Finding(
            "warning",
            "untracked",
            where,
            f"{_count(len(where), 'BN layer')} without running statistics: nothing to share, and evaluation "
            "normalizes by the test batch, so a prediction depends on its neighbors",
            "set track_running_stats=True, or use groupnorm",
        )


def _untrained(s: Subject) -> Iterator[Finding]:
    tracked = {p: m for p, m in s.batch_norms.items() if s.readable(m)}
    fresh = tuple(p for p, m in tracked.items() if not m.num_batches_tracked)
    if fresh:
        some = len(fresh) < len(tracked)
        yield Finding(
            "warning" if some else "note",
            "untrained",
            fresh,
            f"{len(fresh)} of {_count(len(tracked), 'BN layer')} with counter 0: untrained statistics, mean "
            f"0 and variance 1, would be used in eval mode{', while others are trained' if some else ''}",
            "train or recalibrate before evaluating; if statistics were loaded, load their counter too",
        )


def _broken(s: Subject) -> Iterator[Finding]:
    for path, layer in s.norms.items():
        if not s.readable(layer):
            continue
        statistics = dict(layer.named_buffers(recurse=False))
        faults = []
        if negative := sum(int((t < 0).sum()) for n, t in statistics.items() if n == "running_var"):
            faults.append(_count(negative, "negative variance"))
        if wild := sum(int((~t.isfinite()).sum()) for t in statistics.values()):
            faults.append(_count(wild, "NaN or infinite value"))
        if faults:
            yield Finding(
                "error",
                "broken-statistics",
                (path,),
                f"running statistics with {' and '.join(faults)}: eval mode breaks",
                "recalibrate; keep adaptive server steps and added noise away from statistics",
            )


def _half(s: Subject) -> Iterator[Finding]:
    narrow = (torch.float16, torch.bfloat16)
    if keys := [k for k in s.keys(Role.STATISTICS) if s.state[k].dtype in narrow]:
        yield Finding(
            "warning",
            "half-statistics",
            _layers(keys),
            f"{_count(len(keys), 'statistic')} in half precision: small updates are rounded away",
            "keep normalization layers in float32: layer.float()",
        )


def _unmeasured(s: Subject) -> Iterator[Finding]:
    if s.measured.failure:
        taken = [EXAMPLES, *(s.shape or ())]
        yield Finding(
            "warning",
            "unmeasured",
            (),
            f"the model does not run on a batch of shape {taken} in training mode: {s.measured.failure}",
            "give the shape of one example that the model takes",
        )


def _one_value(s: Subject) -> Iterator[Finding]:
    if s.measured.values:
        where = tuple(p for p in s.batch_norms if s.measured.values.get(p) == 1)
    else:
        where = tuple(p for _, left, p, _ in s.pairs if isinstance(left, nn.Linear) and p in s.batch_norms)
    layers = _count(len(where), "BN layer sees", "BN layers see")
    if where and s.batch_size == 1:
        yield Finding(
            "error",
            "one-value",
            where,
            f"{layers} one value per channel at batch size 1: training raises",
            "use a batch size of at least 2, or groupnorm",
        )
    elif where:
        yield Finding(
            "warning",
            "one-value",
            where,
            f"{layers} one value per channel and example: a last batch of one raises, and so does a client "
            "with a single example",
            "join a last batch of one to the one before it (training here does) or drop it",
        )


def _batch_of_one(s: Subject) -> Iterator[Finding]:
    if s.batch_size == 1 and s.batch_norms:
        yield Finding(
            "warning",
            "batch-of-one",
            tuple(s.batch_norms),
            "batches of one: BN trains with the moments of single examples and evaluates with their average",
            "use larger batches, or groupnorm",
        )


def _fewest_values(s: Subject) -> Iterator[Finding]:
    values = {p: v for p, v in s.measured.values.items() if p in s.batch_norms}
    if values:
        path = min(values, key=lambda p: values[p])
        yield Finding(
            "note",
            "fewest-values",
            (path,),
            f"{values[path] * s.batch_size:,} values per channel at batch size {s.batch_size}, "
            f"{values[path]:,} in a last batch of one: the fewest of all BN layers",
            "use larger batches if that is too few for a mean and a variance",
        )


def _groups(s: Subject) -> Iterator[Finding]:
    layers = {p: m for p, m in s.norms.items() if isinstance(m, nn.GroupNorm)}
    if void := tuple(p for p in layers if s.measured.values.get(p) == 1):
        yield Finding(
            "error",
            "group-of-one",
            void,
            f"{_count(len(void), 'GroupNorm layer')} with one value a group: the output is the shift, "
            "whatever the input",
            "use fewer groups",
        )
    if alone := tuple(p for p, m in layers.items() if m.num_groups == m.num_channels):
        yield Finding(
            "warning",
            "group-is-instance",
            alone,
            f"{_count(len(alone), 'GroupNorm layer')} with one channel a group: that is InstanceNorm",
            "use fewer groups: two to sixteen channels in each",
        )
    if one := tuple(p for p, m in layers.items() if m.num_groups == 1 < m.num_channels):
        yield Finding(
            "note",
            "group-is-layer",
            one,
            f"{_count(len(one), 'GroupNorm layer')} with one group: that is LayerNorm",
            "use more groups unless that is meant",
        )


def _conversion(s: Subject) -> Iterator[Finding]:
    channels = {p: channels_of(m) for p, m in s.batch_norms.items()}
    for lint, what, where in (
        ("conversion-raises", "raise", [p for p, c in channels.items() if c > 32 and c % 32]),
        ("conversion-degenerates", "be InstanceNorm", [p for p, c in channels.items() if 0 < c <= 32]),
    ):
        if where:
            widths = ", ".join(map(str, sorted({channels[p] for p in where})))
            yield Finding(
                "note",
                lint,
                tuple(where),
                f"GroupNorm(min(32, C), C) would {what} for {_count(len(where), 'BN layer')} (C = {widths})",
                "convert with fedbn.nn.conversion.convert(model, 'group', groups=8): it takes the nearest divisor",
            )


def _idle_bias(s: Subject) -> Iterator[Finding]:
    biases = {
        path: left.bias
        for path, left, _, right in s.pairs
        if isinstance(left, (_ConvNd, nn.Linear)) and isinstance(right, (_BatchNorm, _InstanceNorm))
        if left.bias is not None and not is_lazy(left.bias)
    }
    if biases:
        size = sum(b.numel() * b.element_size() for b in biases.values())
        yield Finding(
            "note",
            "idle-bias",
            tuple(biases),
            f"{_count(len(biases), 'bias', 'biases')} that the next normalization removes ({size:,} B)",
            "set bias=False there",
        )


def _synchronized(s: Subject) -> Iterator[Finding]:
    if where := tuple(p for p, m in s.norms.items() if isinstance(m, nn.SyncBatchNorm)):
        yield Finding(
            "warning",
            "sync",
            where,
            f"{_count(len(where), 'SyncBatchNorm layer')}: it synchronizes within a torch process group, "
            "which federated clients are not; each would normalize by its own batch",
            "use BatchNorm; global-recalibrated is how clients agree on statistics here",
        )


def _tied(s: Subject) -> Iterator[Finding]:
    places: dict[object, list[str]] = {}
    for key, value in s.state.items():
        stored = not is_lazy(value) and value.numel() > 0 and value.data_ptr() != 0
        place = (value.device, value.data_ptr(), value.shape, value.stride()) if stored else id(value)
        places.setdefault(place, []).append(key)
    for keys in places.values():
        owners = dict.fromkeys(str(s.owned.owner(k)) for k in keys)
        if len(owners) > 1:
            yield Finding(
                "error",
                "tied",
                tuple(keys),
                f"one tensor under {len(keys)} keys of different owners ({', '.join(owners)}): the last one "
                "loaded wins",
                "untie the layers, or choose a strategy with one owner for both roles",
            )
        elif len(keys) > 1:
            yield Finding(
                "warning",
                "tied",
                tuple(keys),
                f"one tensor under {len(keys)} keys: counted, sent and averaged {len(keys)} times",
                "untie the layers, or register the tensor once",
            )


def _after_head(s: Subject) -> Iterator[Finding]:
    last = head(s.model)
    order = s.measured.order or tuple(p for p, _ in s.model.named_modules())
    where = tuple(p for p in order[order.index(last) + 1 :] if p in s.norms) if last in order else ()
    if where:
        yield Finding(
            "warning",
            "after-head",
            where,
            f"{_count(len(where), 'normalization layer')} after {last!r}, the last weighted layer and so the "
            "head: either logits are normalized, or it is no classifier",
            "register the classifier last and leave its output as it is",
        )


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
    _after_head,
    _untrained,
    _counters,
    _parameters_only,
    _fewest_values,
    _conversion,
    _idle_bias,
)

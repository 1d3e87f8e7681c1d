"""State of one user as a value that can be stored, sent, merged, split, or exported to a plain network."""

from __future__ import annotations

import hashlib
import json
import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from fedbn.errors import UserError
from fedbn.online.alignments.states import STATE, merge_states
from fedbn.online.statistics import within_limits
from fedbn.statistics.moments import Moments, pooled

VERSION = 4
"""Version of the format of `BNState.to_bytes`. Other versions are rejected."""

COUNTS = ("t", "offered", "learned")
"""Entries of a tally that are added when states are merged."""

TALLY = (*COUNTS, "entropy", "prior_entropy")
"""Entries of a tally."""

MAX_COUNT = 1e12
"""Largest count of windows or entry of a tally in a valid state."""

ALIGNMENT = "alignment "
"""Prefix of the names of tensors of the alignment."""

NAMES = {"n", "classes", "extra", *(f"{part}{name}" for part in ("", "base ") for name in ("mean", "var", "std"))}
NAMES |= {f"{ALIGNMENT}{name}" for name in STATE}
"""Names of tensors that a state in bytes can have."""

MAX_VALUES = 2**24
"""Largest number of values of a state that is read from bytes."""


@dataclass(frozen=True)
class BNState:
    """State of a rule for one user, with all layers by path. Counts are in windows.

    `merge` and `unmerge` are exact for rules whose parts are plain moments of windows (``pseudo``, ``cumulative``, the
    classwise ones), if nothing was discounted in between. Running averages contain their initial values, so merging
    them only averages them, weighted by windows.

    Attributes:
        parts: one or more sets of moments per layer; several for rules with one per class, component or window.
        base: statistics from calibration; empty: the prior.
        extra: ``[E, C]`` per layer, values other than moments.
        classes: ``[K]`` float64, posteriors summed over the windows learned from.
        tally: counters: updates ``t``, windows ``offered`` and ``learned``, fading entropies of the guard.
        frozen: whether the statistics are frozen.
        rule: text of the rule.
        model: `fingerprint` of the network.
        alignment: cells, parameters and counts (`fedbn.online.alignments.aligner.Aligner.start`); empty
            without one. Merging adds the cells of both states, which a bank reduces to its number of cells.
    """

    parts: Mapping[str, tuple[Moments, ...]]
    base: Mapping[str, Moments]
    extra: Mapping[str, Tensor]
    classes: Tensor
    tally: Mapping[str, float]
    frozen: bool
    rule: str
    model: str
    alignment: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def layers(self) -> dict[str, Moments]:
        """Union of the parts of each layer."""
        return {path: pooled(parts) for path, parts in self.parts.items()}

    @property
    def n(self) -> float:
        """Number of windows learned from, after decay."""
        return max(float(sum(part.n for part in parts)) for parts in self.parts.values())

    def merge(self, other: BNState) -> BNState:
        """State after the windows of both; calibration and freezing are those of this state.

        Raises:
            UserError: the states have different models or rules.
        """
        return self._combine(other, Moments.merge, 1.0)

    def unmerge(self, part: BNState) -> BNState:
        """Remove a part that was merged before, e.g. to erase one session.

        Raises:
            UserError: the states have different models or rules or an alignment, or the part has more windows than this
                state.
        """
        if self.alignment:
            raise UserError("a part cannot be removed from an aligned state: forget the user, and start again")
        try:
            return self._combine(part, Moments.unmerge, -1.0)
        except ValueError as error:
            raise UserError(f"this part was never merged into the state: {error}") from None

    def decay(self, factor: float) -> BNState:
        """Multiply the weight of every window by ``factor``; mean and variance do not change."""
        parts = {path: tuple(m.decay(factor) for m in ms) for path, ms in self.parts.items()}
        alignment = {k: v * factor if k in ("n", "evidence") else v for k, v in self.alignment.items()}
        return replace(self, parts=parts, classes=self.classes * factor, alignment=alignment)

    def shrink(self, prior: BNState, n0: float) -> BNState:
        """Merge a prior with the weight of ``n0`` windows into every part, e.g. the state of a population.

        Raises:
            UserError: the states have different models or rules.
        """
        self.require(prior.model, prior.rule)
        parts = {
            path: tuple(m.shrink(p, n0) for m, p in zip(ms, prior.parts[path], strict=True))
            for path, ms in self.parts.items()
        }
        return replace(self, parts=parts)

    def distance(self, other: BNState) -> float:
        """2-Wasserstein distance of the states as Gaussians with independent channels, over all layers.

        Raises:
            UserError: the states have different models, or one has no windows.
        """
        self.require(other.model)
        layers = other.layers
        if not (self.n and other.n):
            raise UserError("the distance to a state without windows is not defined: let the user process some first")
        return float(sum(m.w2(layers[path]) ** 2 for path, m in self.layers.items()) ** 0.5)

    def require(self, model: str, rule: str | None = None) -> None:
        """Check the model and, optionally, the rule of the state.

        Raises:
            UserError: the state has another model or rule.
        """
        require_origin(self.model, self.rule, model, self.rule if rule is None else rule)

    def validate(self, widths: Mapping[str, int], parts: int, extra: int, classes: int) -> None:
        """Check the names, shapes and values of the whole state.

        Args:
            widths: channels of each layer, by path.
            parts: number of parts of each layer.
            extra: number of values per channel other than moments.
            classes: number of classes.

        Raises:
            UserError: unknown or missing layers, another shape, or values that are not finite or out of range.
        """
        if self.parts.keys() != widths.keys() or self.base.keys() not in (set(), widths.keys()):
            raise invalid_state(f"it has the layers {', '.join(self.parts)}, not {', '.join(widths)}")
        if self.extra.keys() != widths.keys() or set(self.tally) != set(TALLY):
            raise invalid_state("it lacks entries, or has unknown ones")
        for path, width in widths.items():
            moments = [*self.parts[path], *([self.base[path]] if self.base else [])]
            shapes = {tuple(t.shape) for m in moments for t in (m.mean, m.m2)}
            if len(self.parts[path]) != parts or shapes != {(width,)} or self.extra[path].shape != (extra, width):
                raise invalid_state(f"layer {path!r} has another shape than in this model")
        if self.classes.shape != (classes,):
            raise invalid_state(f"it has {self.classes.numel()} classes, not {classes}")
        counts = torch.stack([torch.stack([m.n for m in ms]) for ms in self.parts.values()])
        tally = torch.tensor([self.tally[name] for name in TALLY], dtype=torch.float64)
        for values in (counts, self.classes, tally):
            if not bool(((values >= 0) & (values <= MAX_COUNT)).all()):
                raise invalid_state(f"its counts must be finite, not negative, and at most {MAX_COUNT:g}")
        used = [m for ms in (*self.parts.values(), tuple(self.base.values())) for m in ms if m.n > 0]
        limited = all(bool(within_limits(m.mean, m.variance())) for m in used)
        if not limited or not bool(torch.cat([e.flatten() for e in self.extra.values()]).isfinite().all()):
            raise invalid_state("its statistics are not finite, negative, or too large")

    def to_bytes(self, dtype: torch.dtype = torch.float32) -> bytes:
        """Serialize as safetensors. ``torch.float16`` halves the size at 3 digits, storing standard deviations.

        Raises:
            UserError: a value is too large for float16.
        """
        paths = list(self.parts)
        counts = torch.stack([torch.stack([m.n for m in self.parts[path]]) for path in paths])
        tensors = {"classes": self.classes.double(), "n": counts}
        if bool((counts > 0).any()):
            tensors |= _pack("", [self.parts[path] for path in paths], dtype)
        if self.base:
            tensors |= _pack("base ", [(self.base[path],) for path in paths], dtype)
        if any(e.numel() for e in self.extra.values()):
            tensors["extra"] = torch.cat([self.extra[path] for path in paths], 1).to(dtype)
        tensors |= {f"{ALIGNMENT}{name}": value.float() for name, value in self.alignment.items()}
        about = {
            "rule": self.rule,
            "model": self.model,
            "frozen": self.frozen,
            "layers": {path: len(self.parts[path][0].mean) for path in paths},
            "tally": [self.tally[name] for name in TALLY],
        }
        # One entry, because safetensors writes several in random order, and equal states must have equal bytes.
        text = json.dumps(about | {"version": VERSION, "crc32": _checksum(tensors, about)}, separators=(",", ":"))
        return safetensors.torch.save({k: v.contiguous() for k, v in tensors.items()}, {"bnstate": text})

    @staticmethod
    def from_bytes(data: bytes, model: str | None = None, rule: str | None = None) -> BNState:
        """Deserialize the result of `to_bytes`.

        Args:
            data: bytes of a state.
            model: expected fingerprint of the model.
            rule: expected text of the rule.

        Raises:
            UserError: the data is damaged or has another format version, model or rule.
        """
        damaged = UserError("these bytes are not a user's state, or are damaged: write them with to_bytes()")
        try:
            tensors = safetensors.torch.load(data)
            header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
            about = json.loads(header["__metadata__"]["bnstate"])
            version = about.pop("version")
            checksum = about.pop("crc32")
        except Exception:
            raise damaged from None
        if type(version) is int and version != VERSION:
            raise UserError(f"this state has format {version}, this program reads {VERSION}: start with a new state")
        try:
            if version != VERSION or checksum != _checksum(tensors, about):
                raise damaged
            state = BNState._from_parts(tensors, **about)
        except Exception:  # bytes of strangers can have any content
            raise damaged from None
        if model is not None:
            state.require(model, rule)
        return state

    @staticmethod
    def _from_parts(
        tensors: Mapping[str, Tensor], rule: Any, model: Any, frozen: Any, layers: Any, tally: Any
    ) -> BNState:
        """State of the tensors and metadata of `to_bytes`. Raises any exception if they are not valid."""
        widths, tally = layers, dict(zip(TALLY, tally, strict=True))
        real = [t.dtype in (torch.float16, torch.float32, torch.float64) for t in tensors.values()]
        numbers = [type(v) in (int, float) and math.isfinite(v) for v in tally.values()]
        texts = [isinstance(text, str) for text in (rule, model)]
        if not (tensors.keys() <= NAMES and all((*real, *numbers, *texts, isinstance(frozen, bool)))):
            raise ValueError
        if min(widths.values()) < 1 or sum(widths.values()) * max(1, tensors["n"].shape[1]) > MAX_VALUES:
            raise ValueError
        extra = tensors.get("extra", torch.zeros(0, sum(widths.values())))
        base = _unpack("base ", tensors, torch.ones(len(widths), 1), widths) if "base mean" in tensors else {}
        return BNState(
            parts=_unpack("", tensors, tensors["n"], widths),
            base={path: parts[0] for path, parts in base.items()},
            extra=dict(zip(widths, extra.split(list(widths.values()), 1), strict=True)),
            classes=tensors["classes"],
            tally=tally,
            frozen=frozen,
            rule=rule,
            model=model,
            alignment={name.removeprefix(ALIGNMENT): t for name, t in tensors.items() if name.startswith(ALIGNMENT)},
        )

    def _combine(self, other: BNState, combine: Callable[[Moments, Moments], Moments], sign: float) -> BNState:
        self.require(other.model, other.rule)
        parts = {
            path: tuple(combine(a, b) for a, b in zip(ms, other.parts[path], strict=True))
            for path, ms in self.parts.items()
        }
        total = self.n + sign * other.n
        share = sign * other.n / total if total else 0.0
        return replace(
            self,
            parts=parts,
            extra={path: e + share * (other.extra[path] - e) for path, e in self.extra.items()},
            classes=(self.classes + sign * other.classes).clamp_min(0),
            tally={k: v + sign * other.tally[k] if k in COUNTS else v for k, v in self.tally.items()},
            alignment=merge_states(self.alignment, other.alignment),
        )


def require_origin(found_model: str, found_rule: str, model: str, rule: str) -> None:
    """Check the model and the rule of a state.

    Raises:
        UserError: the state has another model or rule.
    """
    if found_model != model:
        raise UserError(
            f"this state belongs to model {found_model[:64]}, not {model}: statistics are valid only for the weights "
            "they were measured with; load it into that model, or start with a new state"
        )
    if found_rule != rule:
        raise UserError(f"this state belongs to rule {found_rule[:64]!r}, not {rule!r}: personalize with that rule")


def fingerprint(model: nn.Module) -> str:
    """Sixteen hexadecimal digits of a hash of the names, shapes and values of a model's state.

    >>> a, b = nn.Linear(2, 2), nn.Linear(2, 2)
    >>> fingerprint(a) == fingerprint(a), fingerprint(a) == fingerprint(b)
    (True, False)
    """
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def invalid_state(reason: str) -> UserError:
    """The error for a state that does not fit."""
    return UserError(f"this state is not valid: {reason}; use a state that to_bytes() wrote for this model and rule")


def _checksum(tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> int:
    crc = zlib.crc32(json.dumps(about, sort_keys=True).encode())
    for _, tensor in sorted(tensors.items()):
        crc = zlib.crc32(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes(), crc)
    return crc


def _pack(name: str, layers: Sequence[tuple[Moments, ...]], dtype: torch.dtype) -> dict[str, Tensor]:
    """Concatenated means and variances ``[parts, channels]``, since one tensor per layer has a larger header."""
    mean = torch.cat([torch.stack([m.mean for m in parts]) for parts in layers], 1)
    var = torch.cat([torch.stack([m.variance() if m.n > 0 else m.m2 for m in parts]) for parts in layers], 1)
    if dtype is not torch.float16:
        return {f"{name}mean": mean.to(dtype), f"{name}var": var.to(dtype)}
    out = {f"{name}mean": mean.half(), f"{name}std": var.sqrt().half()}
    if not all(t.isfinite().all() for t in out.values()):
        raise UserError("these statistics are too large for float16: use float32")
    return out


def _unpack(
    name: str, tensors: Mapping[str, Tensor], n: Tensor, widths: Mapping[str, int]
) -> dict[str, tuple[Moments, ...]]:
    """Inverse of `_pack`. If no layer has any windows, means and variances are not stored."""
    zeros = torch.zeros(n.shape[1], sum(widths.values()))
    std = tensors.get(f"{name}std")
    variances = tensors.get(f"{name}var", zeros) if std is None else std.double() ** 2
    means = tensors.get(f"{name}mean", zeros)
    spans = list(widths.values())
    layers = zip(widths, n, means.split(spans, 1), variances.split(spans, 1), strict=True)
    return {
        path: tuple(Moments.from_variance(*row) for row in zip(count, mean, var, strict=True))
        for path, count, mean, var in layers
    }

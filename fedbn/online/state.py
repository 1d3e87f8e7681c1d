"""State of one user as a value that can be stored, sent, merged, split, or exported to a plain network."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import safetensors.torch
import torch
from torch import Tensor, nn

from fedbn.errors import UserError
from fedbn.statistics.moments import Moments, pooled

VERSION = 3
"""Version of the format of `BNState.to_bytes`. Other versions are rejected."""


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
    """

    parts: Mapping[str, tuple[Moments, ...]]
    base: Mapping[str, Moments]
    extra: Mapping[str, Tensor]
    classes: Tensor
    tally: Mapping[str, float]
    frozen: bool
    rule: str
    model: str

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
            UserError: the states have different models or rules, or the part has more windows than this state.
        """
        try:
            return self._combine(part, Moments.unmerge, -1.0)
        except ValueError as error:
            raise UserError(f"this part was never merged into the state: {error}") from None

    def decay(self, factor: float) -> BNState:
        """Multiply the weight of every window by ``factor``; mean and variance do not change."""
        parts = {path: tuple(m.decay(factor) for m in ms) for path, ms in self.parts.items()}
        return replace(self, parts=parts, classes=self.classes * factor)

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
        if self.model != model:
            raise UserError(
                f"this state belongs to model {self.model}, not {model}: statistics are valid only for the weights "
                "they were measured with; load it into that model, or start with a new state"
            )
        if rule is not None and self.rule != rule:
            raise UserError(f"this state belongs to rule {self.rule!r}, not {rule!r}: personalize with that rule")

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
        about = {
            "version": VERSION,
            "rule": self.rule,
            "model": self.model,
            "frozen": self.frozen,
            "layers": {path: len(self.parts[path][0].mean) for path in paths},
            "tally": dict(self.tally),
        }
        # One entry, because safetensors writes several in random order, and equal states must have equal bytes.
        text = json.dumps(about, separators=(",", ":"))
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
        try:
            tensors = safetensors.torch.load(data)
            header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
            about = json.loads(header["__metadata__"]["bnstate"])
            version = about["version"]
        except Exception:
            raise UserError("these bytes are not a user's state, or are damaged: write them with to_bytes()") from None
        if version != VERSION:
            raise UserError(f"this state has format {version}, this program reads {VERSION}: start with a new state")
        widths = about["layers"]
        extra = tensors.get("extra", torch.zeros(0, sum(widths.values())))
        base = _unpack("base ", tensors, torch.ones(len(widths), 1), widths) if "base mean" in tensors else {}
        state = BNState(
            parts=_unpack("", tensors, tensors["n"], widths),
            base={path: parts[0] for path, parts in base.items()},
            extra=dict(zip(widths, extra.split(list(widths.values()), 1), strict=True)),
            classes=tensors["classes"],
            tally=about["tally"],
            frozen=about["frozen"],
            rule=about["rule"],
            model=about["model"],
        )
        if model is not None:
            state.require(model, rule)
        return state

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
        )


COUNTS = ("t", "offered", "learned")
"""Entries of a tally that are added when states are merged."""


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

"""One user's statistics as a value: to keep, send, merge, take apart, or turn into a plain network."""

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

VERSION = 2
"""Of the layout of `BNState.to_bytes`; another one is refused."""


@dataclass(frozen=True)
class BNState:
    """What a rule remembers of one user, all layers, by path. Counts are in windows.

    `merge` and `unmerge` are exact for rules whose parts are plain moments of the windows met (``pseudo``,
    ``cumulative``, the classwise ones), as long as nothing was forgotten in between. Running averages contain their
    start, so merging two is but their mean, weighted by windows.

    Attributes:
        parts: one or more sets of moments a layer; several for rules that keep one a class, component or window.
        base: the statistics that the user was calibrated to; empty: the prior.
        extra: ``[E, C]`` a layer, numbers that are no moments.
        classes: ``[K]`` float64, posteriors summed over the windows learnt from.
        tally: running numbers: updates ``t``, windows ``offered`` and ``learnt``, fading entropies of the guard.
        frozen: the user's statistics do not move.
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
        """All parts of each layer together."""
        return {path: pooled(parts) for path, parts in self.parts.items()}

    @property
    def n(self) -> float:
        """Windows learnt from and not forgotten."""
        return max(float(sum(part.n for part in parts)) for parts in self.parts.values())

    def merge(self, other: BNState) -> BNState:
        """The state of somebody who met both users' windows; calibration and freezing are this state's.

        Raises:
            UserError: of another model or rule.
        """
        return self._with(other, Moments.merge, 1.0)

    def unmerge(self, part: BNState) -> BNState:
        """Take a part that had been merged out again: erase one session.

        Raises:
            UserError: of another model or rule, or it holds more than there is.
        """
        try:
            return self._with(part, Moments.unmerge, -1.0)
        except ValueError as error:
            raise UserError(f"this part was never merged into the state: {error}") from None

    def decay(self, factor: float) -> BNState:
        """Let every window count ``factor`` as much; statistics stay, new windows and the prior gain weight."""
        parts = {path: tuple(m.decay(factor) for m in ms) for path, ms in self.parts.items()}
        return replace(self, parts=parts, classes=self.classes * factor)

    def shrink(self, prior: BNState, n0: float) -> BNState:
        """Mix a prior worth ``n0`` windows into every part, for example a population's state.

        Raises:
            UserError: of another model or rule.
        """
        self.require(prior.model, prior.rule)
        parts = {
            path: tuple(m.shrink(p, n0) for m, p in zip(ms, prior.parts[path], strict=True))
            for path, ms in self.parts.items()
        }
        return replace(self, parts=parts)

    def distance(self, other: BNState) -> float:
        """2-Wasserstein distance between the two as Gaussians with independent channels, all layers together.

        Raises:
            UserError: of another model, or one of them has met nothing.
        """
        self.require(other.model)
        theirs = other.layers
        if not (self.n and other.n):
            raise UserError("a user who has met no windows is at no distance from anybody: let it meet some first")
        return float(sum(m.w2(theirs[path]) ** 2 for path, m in self.layers.items()) ** 0.5)

    def require(self, model: str, rule: str | None = None) -> None:
        """Check that the state fits.

        Raises:
            UserError: it belongs to another model, or another rule where one is given.
        """
        if self.model != model:
            raise UserError(
                f"this state belongs to model {self.model}, not {model}: statistics mean something only under the "
                "weights they were measured with; load it into that model, or let the user start anew"
            )
        if rule is not None and self.rule != rule:
            raise UserError(f"this state was kept by rule {self.rule!r}, not {rule!r}: personalize with that rule")

    def to_bytes(self, dtype: torch.dtype = torch.float32) -> bytes:
        """As safetensors; ``torch.float16`` halves the size for 3 digits (it keeps deviations, not variances).

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
        # One entry, because safetensors writes several in random order and equal states shall be equal bytes.
        text = json.dumps(about, separators=(",", ":"))
        return safetensors.torch.save({k: v.contiguous() for k, v in tensors.items()}, {"bnstate": text})

    @staticmethod
    def from_bytes(data: bytes, model: str | None = None, rule: str | None = None) -> BNState:
        """The inverse of `to_bytes`.

        Args:
            data: as written.
            model: fingerprint that the state must have.
            rule: text of the rule that it must have.

        Raises:
            UserError: damaged, of another version of the layout, of another model or rule.
        """
        try:
            tensors = safetensors.torch.load(data)
            header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
            about = json.loads(header["__metadata__"]["bnstate"])
            version = about["version"]
        except Exception:
            raise UserError("these bytes are no state of a user, or damaged: write them with to_bytes()") from None
        if version != VERSION:
            raise UserError(f"this state has layout {version}, this program reads {VERSION}: let the user start anew")
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

    def _with(self, other: BNState, both: Callable[[Moments, Moments], Moments], sign: float) -> BNState:
        self.require(other.model, other.rule)
        parts = {
            path: tuple(both(a, b) for a, b in zip(ms, other.parts[path], strict=True))
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


COUNTS = ("t", "offered", "learnt")
"""Entries of a tally that add up."""


def fingerprint(model: nn.Module) -> str:
    """Sixteen hexadecimal digits of a hash over names, shapes and values of a network's state.

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
    """Means and variances ``[parts, channels]``, all layers side by side: a header for each would outweigh them."""
    mean = torch.cat([torch.stack([m.mean for m in parts]) for parts in layers], 1)
    var = torch.cat([torch.stack([m.variance() if m.n > 0 else m.m2 for m in parts]) for parts in layers], 1)
    if dtype is not torch.float16:
        return {f"{name}mean": mean.to(dtype), f"{name}var": var.to(dtype)}
    out = {f"{name}mean": mean.half(), f"{name}std": var.sqrt().half()}
    if not all(t.isfinite().all() for t in out.values()):
        raise UserError("these statistics are too large for float16: write them as float32")
    return out


def _unpack(
    name: str, tensors: Mapping[str, Tensor], n: Tensor, widths: Mapping[str, int]
) -> dict[str, tuple[Moments, ...]]:
    """The inverse of `_pack`; parts that hold nothing were not written at all if no layer had any."""
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

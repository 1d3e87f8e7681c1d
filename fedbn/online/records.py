"""Records: rows of a bank as bytes, for stores.

A record is a line of JSON with its format, model, rule and data type, the values of one row, and the CRC-32 of both.
All records of a bank have the same layout, so that many users are written at once, much faster than with
`fedbn.online.state.BNState.to_bytes`.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from fedbn.errors import UserError
from fedbn.online.state import require_origin

FORMAT = 1
"""Version of the format of records. Other versions are rejected."""

BASE = ("base_mean", "base_var")
"""Statistics from calibration, which are stored for calibrated users only."""


class DamagedRecordError(UserError):
    """The bytes of a record are damaged, or are no record."""


class Records:
    """Conversion of rows to records and back.

    Args:
        template: row of a new user, ``[1, ...]`` by name; records have the same names and shapes.
        model: fingerprint of the network.
        rule: text of the rule.

    >>> template = {name: torch.zeros(1, 2) for name in ("mean", "base_mean", "base_var")}
    >>> records = Records(template, "model", "rule")
    >>> [record] = records.pack(template | {"mean": torch.ones(1, 2)}, torch.tensor([0]))
    >>> records.unpack(record)["mean"]
    tensor([1., 1.])
    """

    def __init__(self, template: Mapping[str, Tensor], model: str, rule: str) -> None:
        self.model, self.rule = model, rule
        self._template = template
        self._names = [*(name for name in template if name not in BASE), *BASE]
        self._dtype = template["mean"].dtype
        self._values = np.dtype({torch.float32: "<f4", torch.float64: "<f8"}[self._dtype])
        self._full = sum(template[name].numel() for name in self._names)
        self._short = self._full - sum(template[name].numel() for name in BASE)
        origin = {"format": FORMAT, "model": model, "rule": rule, "dtype": self._values.str}
        self._header = json.dumps(origin, separators=(",", ":")).encode() + b"\n"

    def pack(self, rows: Mapping[str, Tensor], slots: Tensor) -> list[bytes]:
        """Records of the rows ``slots`` ``[U]``."""
        n = len(slots)
        table = torch.cat([rows[name][slots].reshape(n, -1).to(self._dtype) for name in self._names], 1)
        base = torch.cat([self._template[name].reshape(1, -1) for name in BASE], 1)
        calibrated = (table[:, self._short :] != base).any(1).tolist()
        values = table.cpu().numpy().astype(self._values, copy=False)
        bodies = (
            self._header + row[: self._full if known else self._short].tobytes()
            for row, known in zip(values, calibrated, strict=True)
        )
        return [body + zlib.crc32(body).to_bytes(4, "little") for body in bodies]

    def unpack(self, record: bytes) -> dict[str, Tensor]:
        """Row of a record; `BASE` only if the user is calibrated.

        Raises:
            DamagedRecordError: the record is damaged.
            UserError: the record has another format, model or rule.
        """
        body, checksum = record[:-4], record[-4:]
        header, newline, values = body.partition(b"\n")
        if not newline or zlib.crc32(body).to_bytes(4, "little") != checksum:
            raise DamagedRecordError("the stored state is damaged, or was written by another version of the program")
        if header + newline != self._header:
            self._reject(json.loads(header))
        if len(values) not in (self._values.itemsize * self._short, self._values.itemsize * self._full):
            raise DamagedRecordError("the stored state has another size than the states of this model and rule")
        row = torch.from_numpy(np.frombuffer(values, self._values).astype(self._values.newbyteorder("=")))
        if not row.isfinite().all():
            raise DamagedRecordError("the stored state has values that are not finite")
        names = self._names[: None if len(row) == self._full else -len(BASE)]
        shapes = {name: self._template[name].shape[1:] for name in names}
        parts = row.split([math.prod(shape) for shape in shapes.values()])
        return {name: part.view(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}

    def _reject(self, origin: Mapping[str, object]) -> None:
        if origin["format"] != FORMAT:
            raise UserError(
                f"the store has format {origin['format']}, this program reads {FORMAT}: start with a new store"
            )
        require_origin(str(origin["model"]), str(origin["rule"]), self.model, self.rule)
        raise UserError(
            f"the store has values of type {origin['dtype']}, not {self._values.str}: use the same precision"
        )

"""Read arrays from an untrusted pickle.

A pickle is a program: ``pickle.load`` calls any function that the file names. The two sensor data sets are pickles, and
one of them was written by a pandas version that current pandas cannot read. This unpickler looks up every name (a
*global*) in an allow-list: NumPy's array constructors are allowed, pandas' classes are replaced by inert placeholders
that only store their state, and every other name is rejected before anything is called.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO

import numpy as np

from fedbn.errors import UserError


class Inert:
    """Placeholder for a class of another library: stores its arguments and state and does nothing."""

    def __init__(self, *args: object) -> None:
        self.args = args
        self.state: Any = None

    def __setstate__(self, state: object) -> None:
        self.state = state


def _latin1(text: str, encoding: str) -> bytes:
    """Decode bytes as written by Python 2 and protocol 2; other codecs (zlib, ...) are not needed."""
    if encoding not in ("latin1", "latin-1"):
        raise UserError(f"pickle uses the codec {encoding!r}, which array data never needs: refused")
    return text.encode("latin-1")


# The private path of the array constructor changed in NumPy 2; an array's own __reduce__ works with every version.
_reconstruct: Callable[..., Any] = np.empty(0).__reduce__()[0]  # type: ignore[assignment]

ARRAYS: Mapping[str, Callable[..., Any]] = {
    "numpy.core.multiarray._reconstruct": _reconstruct,
    "numpy._core.multiarray._reconstruct": _reconstruct,
    "numpy.ndarray": np.ndarray,
    "numpy.dtype": np.dtype,
    "_codecs.encode": _latin1,
}
"""Allow-list for NumPy arrays in dicts, lists and tuples."""

FRAMES: Mapping[str, Callable[..., Any]] = {
    **ARRAYS,
    "pandas.core.frame.DataFrame": Inert,
    "pandas.core.internals.managers.BlockManager": Inert,
    "pandas.core.indexes.base.Index": Inert,
    "pandas.core.indexes.range.RangeIndex": Inert,
    "pandas.core.indexes.base._new_Index": Inert,
    "copy_reg._reconstructor": Inert,
    "copyreg._reconstructor": Inert,
    "__builtin__.object": Inert,
    "builtins.object": Inert,
    "__builtin__.slice": slice,
    "builtins.slice": slice,
}
"""Like `ARRAYS`, plus data frames written by pandas before 1.0, as `Inert` objects."""


class _RestrictedUnpickler(pickle.Unpickler):
    def __init__(self, file: BinaryIO, allowed: Mapping[str, Callable[..., Any]], source: str) -> None:
        super().__init__(file, fix_imports=False)
        self._allowed, self._source = allowed, source

    def find_class(self, module: str, name: str) -> Any:
        path = f"{module}.{name}"
        if path not in self._allowed:
            raise UserError(
                f"{self._source} uses {path!r}, which array data never needs: refused. "
                "Do not trust this file; reinstall its package"
            )
        return self._allowed[path]


def unpickle(file: BinaryIO, source: str, allowed: Mapping[str, Callable[..., Any]] = ARRAYS) -> Any:
    """Load the object pickled in ``file``, using only the globals in ``allowed``.

    Args:
        file: open binary file, positioned at the start of the pickle.
        source: name of the file in error messages.
        allowed: ``module.name`` -> object to use for it.

    Raises:
        UserError: if the pickle names any other global. Nothing has been called in that case.

    >>> import io
    >>> unpickle(io.BytesIO(pickle.dumps({"x": np.arange(3)})), "example")
    {'x': array([0, 1, 2])}
    >>> unpickle(io.BytesIO(pickle.dumps(print)), "example")
    Traceback (most recent call last):
    fedbn.errors.UserError: example uses 'builtins.print', which array data never needs: refused. \
Do not trust this file; reinstall its package
    """
    return _RestrictedUnpickler(file, allowed, source).load()

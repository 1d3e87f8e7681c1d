"""Read arrays out of a pickle without trusting it.

A pickle is a program: ``pickle.load`` calls any function the file names. The two sensor data sets come
as pickles, one of them of a pandas too old for today's pandas to read. Here every name (a *global*) is
looked up in an allow-list instead: NumPy's array constructors are let through, pandas' classes become
inert stand-ins that only keep their state, and every other name is refused before anything is called.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO

import numpy as np

from fedbn.errors import UserError


class Inert:
    """Stands in for a class of another library: keeps what it was built from and does nothing."""

    def __init__(self, *args: object) -> None:
        self.args = args
        self.state: Any = None

    def __setstate__(self, state: object) -> None:
        self.state = state


def _latin1(text: str, encoding: str) -> bytes:
    """How pickles of Python 2 and protocol 2 write bytes; other codecs (zlib, ...) have no business here."""
    if encoding not in ("latin1", "latin-1"):
        raise UserError(f"pickle asks for the codec {encoding!r}, which array data never needs: refused")
    return text.encode("latin-1")


# Pickle knows the array constructor by a private path that moved in NumPy 2; asking an array avoids both.
_reconstruct: Callable[..., Any] = np.empty(0).__reduce__()[0]  # type: ignore[assignment]

ARRAYS: Mapping[str, Callable[..., Any]] = {
    "numpy.core.multiarray._reconstruct": _reconstruct,
    "numpy._core.multiarray._reconstruct": _reconstruct,
    "numpy.ndarray": np.ndarray,
    "numpy.dtype": np.dtype,
    "_codecs.encode": _latin1,
}
"""Enough for a pickle of NumPy arrays in dicts, lists and tuples."""

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
"""The same and data frames as pandas before 1.0 wrote them, as `Inert` objects."""


class _Restricted(pickle.Unpickler):
    def __init__(self, file: BinaryIO, allowed: Mapping[str, Callable[..., Any]], what: str) -> None:
        super().__init__(file, fix_imports=False)
        self._allowed, self._what = allowed, what

    def find_class(self, module: str, name: str) -> Any:
        wanted = f"{module}.{name}"
        if wanted not in self._allowed:
            raise UserError(
                f"{self._what} asks for {wanted!r}, which array data never needs: refused. "
                "Do not trust this file; reinstall its package"
            )
        return self._allowed[wanted]


def unpickle(file: BinaryIO, what: str, allowed: Mapping[str, Callable[..., Any]] = ARRAYS) -> Any:
    """The object pickled in ``file``, made of nothing but what ``allowed`` lists.

    Args:
        file: an open binary file at the start of the pickle.
        what: what to call the file in an error message.
        allowed: ``module.name`` -> what to use for it.

    Raises:
        UserError: the pickle names anything else; nothing has been called then.

    >>> import io
    >>> unpickle(io.BytesIO(pickle.dumps({"x": np.arange(3)})), "example")
    {'x': array([0, 1, 2])}
    >>> unpickle(io.BytesIO(pickle.dumps(print)), "example")
    Traceback (most recent call last):
    fedbn.errors.UserError: example asks for 'builtins.print', which array data never needs: refused. \
Do not trust this file; reinstall its package
    """
    return _Restricted(file, allowed, what).load()

"""Every kind of exception that a loader, training or a strategy can raise, with private text in it."""

from __future__ import annotations

import json
import os
import pickle
import zipfile

import numpy as np
import pandas as pd
import pyarrow
import torch
from safetensors import SafetensorError

from fedbn.errors import UserError
from fedbn.stacked.layers import Unstackable

SECRET = "patient-Müller-7"
"""Private text; also part of class names and notes."""


class LocalError(Exception):
    """An exception of a user's own code that cannot be pickled and whose text cannot be read."""

    def __init__(self, first, second):
        super().__init__(first)
        self.second = second

    def __str__(self):
        raise RuntimeError(SECRET)


def raised(function):
    """The exception that a function raises."""
    try:
        function()
    except Exception as error:
        return error
    raise AssertionError("nothing was raised")


def with_cause():
    try:
        int(SECRET)
    except ValueError as error:
        raise UserError(f"bad cell {SECRET}") from error


def with_note():
    error = KeyError("x")
    error.add_note(SECRET)
    return error


SIMPLE = (
    *(UserError, Unstackable, Exception, RuntimeError, ValueError, TypeError, AttributeError, NameError),
    *(KeyError, IndexError, LookupError, StopIteration, RecursionError, NotImplementedError, AssertionError),
    *(MemoryError, torch.OutOfMemoryError, OSError, PermissionError, ConnectionResetError, TimeoutError, EOFError),
    *(ImportError, ModuleNotFoundError, ZeroDivisionError, FloatingPointError, OverflowError, np.linalg.LinAlgError),
    *(zipfile.BadZipFile, pickle.UnpicklingError, pd.errors.ParserError, pd.errors.EmptyDataError),
    *(pyarrow.ArrowInvalid, SafetensorError, UserWarning),
)

ERRORS = {kind.__name__: kind(SECRET) for kind in SIMPLE} | {
    "FileNotFoundError": raised(lambda: os.stat(f"/nowhere/{SECRET}.csv")),
    "UnicodeDecodeError": raised(lambda: SECRET.encode("latin-1").decode("utf-8")),
    "JSONDecodeError": raised(lambda: json.loads(SECRET)),
    "cell": raised(lambda: pd.to_numeric(pd.Series([SECRET]))),
    "tensor": raised(lambda: torch.zeros(2, 3) @ torch.zeros(2, 3)),
    "state dict": raised(lambda: torch.nn.Linear(1, 1).load_state_dict({SECRET: torch.zeros(1)})),
    "cause": raised(with_cause),
    "note": with_note(),
    "group": ExceptionGroup(SECRET, [ValueError(SECRET), OSError(SECRET)]),
    "unreadable": LocalError(SECRET, SECRET),
    "class name": type(SECRET, (KeyError,), {})(SECRET),
    "class name in module": type("Patient7", (ArithmeticError,), {"__module__": "builtins"})(SECRET),
}
"""Exceptions by name."""

EXPECTED = {"UserError": (101, "UserError"), "OutOfMemoryError": (102, "OutOfMemoryError")} | {
    "FileNotFoundError": (103, "FileNotFoundError"),
    "ModuleNotFoundError": (104, "ModuleNotFoundError"),
    "ZeroDivisionError": (105, "ZeroDivisionError"),
    "cell": (100, "ValueError"),
    "unreadable": (100, "LocalError"),
    "class name": (100, "KeyError"),
    "class name in module": (105, "ArithmeticError"),
}
"""Codes and class names of some of them."""


def is_private(text):
    """Whether a text contains a part of the private text."""
    return any(part.lower() in str(text).lower() for part in ("patient", "Müller", "M\\xfc", "ller-7"))

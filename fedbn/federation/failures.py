"""Errors of clients, of which only a class name and a code leave the client.

The text of an exception can hold private data: a cell of a file, a label, a path. `report` therefore writes it, with
its traceback, to the client's own log and returns a `Report`, which is all that the server, its notices and its results
receive. All engines use it.
"""

from __future__ import annotations

import logging
import os
import re
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch

from fedbn.errors import UserError
from fedbn.federation.context import CENTRAL_TRAINER

log = logging.getLogger(__name__)

LOG_VARIABLE = "FEDBN_CLIENT_LOG"
"""Environment variable with the path of the clients' log; without it, the log is standard error."""

CLIENT_LOG = "clients.log"
"""Name of the clients' log in a directory of results."""

CODES = {
    100: "an error in the program",
    101: "an error in the settings or data of this client",
    102: "not enough memory",
    103: "a file, disk or connection",
    104: "a missing or broken package",
    105: "invalid arithmetic",
}
"""Meaning of each code. Codes are stable: they are never renumbered."""

KINDS: tuple[tuple[int, tuple[type[BaseException], ...]], ...] = (
    (101, (UserError,)),
    (102, (MemoryError, torch.OutOfMemoryError)),
    (103, (OSError, EOFError)),
    (104, (ImportError,)),
    (105, (ArithmeticError,)),
)
"""Exception classes of each code; all other classes have code 100."""

CLASS_NAME = re.compile(r"[A-Za-z_]\w{0,63}", re.ASCII)


class ClientError(UserError):
    """A client failed or did not reply; the run stops, and completed rounds are kept."""


def client_name(user: int) -> str:
    """Name of a client in messages.

    >>> client_name(3)
    'user 3'
    """
    return "central trainer" if user == CENTRAL_TRAINER else f"user {user}"


@dataclass(frozen=True)
class Report:
    """What the server learns about an error of a client.

    Attributes:
        name: name of the exception class.
        code: a key of `CODES`.

    >>> print(Report("FileNotFoundError", 103))
    FileNotFoundError (code 103: a file, disk or connection); the log of this client has the details
    """

    name: str
    code: int

    def __str__(self) -> str:
        return f"{self.name} (code {self.code}: {CODES[self.code]}); the log of this client has the details"


def classify(error: BaseException) -> Report:
    """Class name and code of an exception, without any of its content.

    A class that was created at run time could have data in its name. It is replaced by the first of its base classes
    that its module defines under its name.

    >>> classify(ZeroDivisionError("cell 7 of patient 3"))
    Report(name='ZeroDivisionError', code=105)
    >>> classify(type("Patient3", (KeyError,), {})())
    Report(name='KeyError', code=100)
    """
    code = next((code for code, classes in KINDS if isinstance(error, classes)), 100)
    return Report(next(c.__name__ for c in type(error).__mro__ if _is_defined(c)), code)


def _is_defined(kind: type) -> bool:
    module = sys.modules.get(kind.__module__)
    return getattr(module, kind.__name__, None) is kind and bool(CLASS_NAME.fullmatch(kind.__name__))


def report(what: str, error: BaseException, path: str | None = None) -> Report:
    """Write an exception to the client's log.

    Args:
        what: what the client did, without private data, such as ``train, user 3``.
        error: the exception.
        path: path of the log; None for the path in `LOG_VARIABLE`, or standard error.

    Returns:
        Class name and code.
    """
    text = f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S}Z {what}\n{''.join(traceback.format_exception(error))}"
    if path := path or os.environ.get(LOG_VARIABLE):
        with suppress(OSError):
            _append(Path(path), text)
            return classify(error)
    log.error(text)
    return classify(error)


def _append(path: Path, text: str) -> None:
    """Append to a file that only its owner can read; complete entries even if several processes write."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    with os.fdopen(descriptor, "ab", buffering=0) as file:
        file.write(text.encode(errors="backslashreplace") + b"\n")


@contextmanager
def client_log(path: Path) -> Iterator[None]:
    """Set the clients' log in this context, in this process and in those that it starts.

    Raises:
        ClientError: as raised in the context, with the path of the log.
    """
    path = path.resolve()
    previous = os.environ.get(LOG_VARIABLE)
    os.environ[LOG_VARIABLE] = str(path)
    try:
        yield
    except ClientError as error:
        raise ClientError(f"{error}: {path}" if path.exists() else str(error)) from None
    finally:
        if previous is None:
            del os.environ[LOG_VARIABLE]
        else:
            os.environ[LOG_VARIABLE] = previous


@contextmanager
def reported(what: str) -> Iterator[None]:
    """Replace an exception by a `ClientError` with its report, as the server of another engine does.

    Raises:
        ClientError: an exception was raised in the context.
    """
    try:
        yield
    except Exception as error:
        raise ClientError(f"{what}: {report(what, error)}") from None

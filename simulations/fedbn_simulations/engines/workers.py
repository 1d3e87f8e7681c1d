"""Ways to call a ClientApp: in this process, with or without a time limit, or in a worker process.

A call returns the reply and the context with the client's new state. An exception of the app leaves the context of the
caller unchanged.
"""

from __future__ import annotations

import os
import queue
import random
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any, Protocol

import cloudpickle
import numpy as np
import torch
from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedbn.seeds import seed_torch
from fedbn_simulations.flower.processes import STOP_SECONDS, kill_worker, prepare_worker, worker_context

ClientCallable = Callable[[Message, Context], Message]
Result = tuple[Message, Context]


class ClientCallError(Exception):
    """A call of a ClientApp failed; the text names the cause, `details` is the traceback of the app, if any."""

    def __init__(self, text: str, details: str = "") -> None:
        super().__init__(text)
        self.details = details


class Caller(Protocol):
    """Calls a ClientApp; one thread uses a caller at a time."""

    def __call__(self, message: Message, context: Context, seed: int | None) -> Result:
        """Reply and new context.

        Args:
            message: message to the client.
            context: context of the node; the app may modify it.
            seed: seed of the global random number generators during the call; None: they continue.

        Raises:
            ClientCallError: the app raised an exception, took too long, or ended its process.
        """
        ...

    def close(self) -> None:
        """Release resources."""
        ...


@contextmanager
def seeded(seed: int | None) -> Iterator[None]:
    """Seed the global generators of Python, NumPy and PyTorch in this context; None does nothing.

    >>> with seeded(1):
    ...     first = random.random()
    >>> with seeded(1):
    ...     assert random.random() == first
    """
    if seed is None:
        yield
        return
    python_state, numpy_state = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        random.seed(seed)
        np.random.seed(seed % 2**32)
        seed_torch(seed)
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)


def call_app(app: ClientCallable, message: Message, context: Context, seed: int | None) -> Result:
    """Call an app in this thread.

    Raises:
        ClientCallError: the app raised an exception, or did not return a message.
    """
    try:
        with seeded(seed):
            reply = app(message, context)
    except (Exception, SystemExit) as error:
        trace = "".join(traceback.format_exception(error))
        raise ClientCallError(f"{type(error).__name__}: {error}", trace) from error
    if not isinstance(reply, Message):
        raise ClientCallError(f"the ClientApp returned {type(reply).__name__} instead of a Message")
    return reply, context


class InProcessCaller:
    """Calls the app in this process. After the time limit, the call goes on, but its result is discarded."""

    def __init__(self, app: ClientCallable, seconds: float | None = None) -> None:
        """Create a caller; ``seconds`` is the time limit of a call."""
        self.app, self.seconds = app, seconds

    def __call__(self, message: Message, context: Context, seed: int | None) -> Result:
        """See `Caller`."""
        if self.seconds is None:
            return call_app(self.app, message, context, seed)
        results: queue.SimpleQueue[Result | ClientCallError] = queue.SimpleQueue()

        def run() -> None:
            try:
                results.put(call_app(self.app, message, context, seed))
            except ClientCallError as error:
                results.put(error)

        threading.Thread(target=run, daemon=True).start()
        try:
            result = results.get(timeout=self.seconds)
        except queue.Empty:
            raise _too_slow(self.seconds) from None
        if isinstance(result, ClientCallError):
            raise result
        return result

    def close(self) -> None:
        """Do nothing."""


class ProcessCaller:
    """Calls the app in a process of its own, which is stopped after the time limit and started again when needed.

    The app is pickled by value where it is not importable, as Ray does.
    """

    def __init__(self, app: ClientCallable, seconds: float | None = None, threads: int = 1) -> None:
        """Create a caller.

        Args:
            app: the app.
            seconds: time limit of a call, from the second call of a process on; None: no limit.
            threads: number of PyTorch threads in the process.
        """
        self.app, self.seconds, self.threads = cloudpickle.dumps(app), seconds, threads
        self._process: Any = None
        self._connection: Connection | None = None

    def __call__(self, message: Message, context: Context, seed: int | None) -> Result:
        """See `Caller`."""
        try:
            call = cloudpickle.dumps((message, context, seed))
        except Exception as error:
            raise ClientCallError(f"the message or the state of the client cannot be pickled: {error}") from error
        try:
            connection = self._connection or self._start()
            connection.send_bytes(call)
            if not connection.poll(self.seconds):
                self.close()
                raise _too_slow(self.seconds)
            result = cloudpickle.loads(connection.recv_bytes())
        except (EOFError, OSError):
            process = self._process
            process.join(1.0)  # its connection ends before its exit code is known
            self.close()
            raise ClientCallError(f"the worker process ended with exit code {process.exitcode}") from None
        if isinstance(result, tuple):
            return result
        raise ClientCallError(*result)

    def close(self) -> None:
        """Stop the process."""
        if self._process is not None and self._connection is not None:
            self._connection.close()
            kill_worker(self._process)
            self._process.join(STOP_SECONDS)
        self._process = self._connection = None

    def _start(self) -> Connection:
        """Start the process and wait until it has loaded the app, which does not count as time of a call."""
        context = worker_context()
        self._connection, remote = context.Pipe()
        arguments = (remote, self.app, self.threads, dict(os.environ))
        self._process = context.Process(target=_serve, args=arguments, daemon=True)
        self._process.start()
        remote.close()
        self._connection.recv_bytes()
        return self._connection


def _too_slow(seconds: float | None) -> ClientCallError:
    return ClientCallError(f"no reply after {seconds:g} seconds, the limit for each client")


def _serve(connection: Connection, pickled_app: bytes, threads: int, environment: dict[str, str]) -> None:
    """Answer calls until the parent ends."""
    os.environ.update(environment)  # the server of processes has that of its own start
    prepare_worker()
    torch.set_num_threads(threads)
    app: ClientApp = cloudpickle.loads(pickled_app)
    connection.send_bytes(b"")
    while True:
        result: Result | list[str]
        try:
            result = call_app(app, *cloudpickle.loads(connection.recv_bytes()))
        except ClientCallError as error:
            result = [str(error), error.details]
        except EOFError:
            return
        connection.send_bytes(cloudpickle.dumps(result))

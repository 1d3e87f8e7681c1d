"""The protocol by which clients agree on statistics, with one exchange per layer."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence

from fedbn.nn.roles import State
from fedbn.statistics.moments import Moments

Aggregates = Sequence[dict[str, Moments]]
"""Results of the exchanges so far, in order: by name, the merged moments of all clients."""

ConsensusStep = Generator[dict[str, Moments], dict[str, Moments], None]
"""A client's part in the protocol: yields its moments by name and receives the merged moments of all clients."""


def run_consensus(
    query: Callable[[list[dict[str, Moments]]], Sequence[dict[str, Moments] | None]],
    count: Callable[[Aggregates, Sequence[dict[str, Moments] | None]], None] = lambda aggregates, replies: None,
) -> Iterator[dict[str, Moments]]:
    """Query all clients and merge their replies, exchange by exchange, until a client has nothing more to send.

    Args:
        query: returns the clients' replies, given the aggregates so far.
        count: called after each exchange with the aggregates before it and the replies, for example to count traffic.

    Yields:
        The aggregate of each exchange.
    """
    aggregates: list[dict[str, Moments]] = []
    while True:
        replies = query(aggregates)
        count(aggregates, replies)
        messages = [reply for reply in replies if reply is not None]
        if len(messages) < len(replies):
            return
        aggregates.append(union(messages))
        yield aggregates[-1]


def replay(start: Callable[[], ConsensusStep], aggregates: Sequence[dict[str, Moments]]) -> dict[str, Moments] | None:
    """A client's next message after the given aggregates; None at the end of the protocol.

    Clients are stateless between messages, so the protocol is run again from its start.
    """
    steps = start()
    try:
        message = next(steps)
        for aggregate in aggregates:
            message = steps.send(aggregate)
    except StopIteration:
        return None
    return message


def union(replies: Iterable[dict[str, Moments]]) -> dict[str, Moments]:
    """Merge the moments of all clients by name, in the given order."""
    merged: dict[str, Moments] = {}
    for reply in replies:
        for path, moments in reply.items():
            merged[path] = merged[path].merge(moments) if path in merged else moments
    return merged


def flatten(moments: dict[str, Moments]) -> State:
    """Moments as named tensors for a message; `unflatten` is the inverse."""
    return {f"{path}|{f}": getattr(m, f) for path, m in moments.items() for f in ("n", "mean", "m2")}


def unflatten(state: State) -> dict[str, Moments]:
    """Moments from named tensors; the inverse of `flatten`."""
    paths = dict.fromkeys(k.rpartition("|")[0] for k in state)
    return {p: Moments(*(state[f"{p}|{f}"] for f in ("n", "mean", "m2"))) for p in paths}

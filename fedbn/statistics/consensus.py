"""The protocol by which clients agree on statistics, one exchange per layer."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence

from fedbn.nn.roles import State
from fedbn.statistics.moments import Moments


def run_consensus(
    ask: Callable[[list[dict[str, Moments]]], Sequence[dict[str, Moments] | None]],
    count: Callable[[Aggregates, Sequence[dict[str, Moments] | None]], None] = lambda answers, replies: None,
) -> Iterator[dict[str, Moments]]:
    """Hold a conversation: ask all clients, answer with the union of what they say, until one has nothing to say.

    Args:
        ask: what clients say to the answers so far.
        count: told of each exchange (`counting`).
    """
    answers: list[dict[str, Moments]] = []
    while True:
        replies = ask(answers)
        count(answers, replies)
        said = [reply for reply in replies if reply is not None]
        if len(said) < len(replies):
            return
        answers.append(union(said))
        yield answers[-1]


def replay(start: Callable[[], ConsensusStep], answers: Sequence[dict[str, Moments]]) -> dict[str, Moments] | None:
    """What a conversation says after having heard ``answers``; None when it has ended.

    Clients are stateless between messages, so the talk is held again from its start.
    """
    steps = start()
    try:
        said = next(steps)
        for aggregates in answers:
            said = steps.send(aggregates)
    except StopIteration:
        return None
    return said


def union(replies: Iterable[dict[str, Moments]]) -> dict[str, Moments]:
    """Layer by layer, the moments of all clients' data together, merged in the order given."""
    out: dict[str, Moments] = {}
    for reply in replies:
        for path, moments in reply.items():
            out[path] = out[path].merge(moments) if path in out else moments
    return out


def flatten(moments: dict[str, Moments]) -> State:
    """Moments as named tensors, for a message; `unflatten` is the inverse."""
    return {f"{path}|{f}": getattr(m, f) for path, m in moments.items() for f in ("n", "mean", "m2")}


def unflatten(state: State) -> dict[str, Moments]:
    """Named tensors back to moments."""
    paths = dict.fromkeys(k.rpartition("|")[0] for k in state)
    return {p: Moments(*(state[f"{p}|{f}"] for f in ("n", "mean", "m2"))) for p in paths}


Aggregates = Sequence[dict[str, Moments]]
"""The answers of a conversation so far, in order: by name, the union of the moments that all clients said."""


ConsensusStep = Generator[dict[str, Moments], dict[str, Moments], None]
"""A client's side of a conversation: it yields moments by name and hears their union over all clients."""

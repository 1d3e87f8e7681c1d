r"""Sums over clients that show nobody's part: fixed-point numbers and masks that cancel, modulo :math:`2^{64}`.

A client sends :math:`w`, its weighted update of parameters and its weighted shifted sums of statistics, each rounded
to ``bits`` binary digits after the point and taken modulo :math:`2^{64}`, plus a mask for each other client of the
round: what one of a pair adds, the other subtracts. A message alone is uniformly distributed; the sum of all is the sum
of what was encoded, exactly. Moments are sums, so pooling needs nothing else. What would not fit is an error:
clipping it silently, as quantisers with a fixed range do, destroys running variances.

After Bonawitz et al., 2017, https://doi.org/10.1145/3133956.3133982. Their key agreement and recovery from
clients that drop out are not here: masks come from the run's seed, and a round without every reply is an error.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedbn.errors import UserError
from fedbn.privacy import flat, from_sums, parameter_keys, statistics_pairs, to_sums, unflat
from fedbn.roles import State
from fedbn.seeds import numpy_generator
from fedbn.strategies.global_pooled import GlobalPooled
from fedbn.strategy import NormStrategy, Progress, Update

if TYPE_CHECKING:
    from fedbn.setting import Setting

MASKED = "masked"
"""Name of the one entry of a masked message."""

EVERYBODY = -2
"""Who a sum is from."""

Words = NDArray[np.uint64]


def encode(values: Tensor, bits: int, clients: int) -> Words:
    """Numbers as integers modulo 2^64, so that a sum over ``clients`` cannot run over.

    >>> encode(torch.tensor([-0.5, 2.0]), bits=8, clients=3)
    array([18446744073709551488,                  512], dtype=uint64)

    Raises:
        UserError: a number that is not finite or too large.
    """
    limit = 2.0 ** (62 - bits) / clients
    largest = float(values.abs().max()) if len(values) else 0.0
    if not largest <= limit:
        raise UserError(
            f"privacy: {largest:g} does not fit a secure sum of {clients} clients with {bits} bits after the point "
            f"(at most {limit:g}): choose fewer bits, or a lower learning rate"
        )
    return np.rint(values.double().numpy() * 2.0**bits).astype(np.int64).view(np.uint64)


def decode(words: Words, bits: int) -> Tensor:
    """A sum of encoded numbers, float64.

    >>> decode(encode(torch.tensor([-0.5, 2.0]), 8, 1), 8)
    tensor([-0.5000,  2.0000], dtype=torch.float64)
    """
    return torch.from_numpy(words.view(np.int64) / 2.0**bits)


def total(messages: Sequence[Words]) -> Words:
    """The sum modulo 2^64."""
    return np.sum(np.stack(messages), axis=0, dtype=np.uint64)


def mask(user: int, others: Sequence[int], size: int, seed: int, round: int) -> Words:
    """What a client adds to its message; over all clients of a round it sums to zero modulo 2^64."""
    out = np.zeros(size, dtype=np.uint64)
    for other in others:
        if other != user:
            draw = numpy_generator(seed, "mask", round, min(user, other), max(user, other))
            words = draw.integers(0, 2**64, size, dtype=np.uint64)
            out = out + words if user < other else out - words
    return out


def message_size(here: Setting) -> int:
    """Numbers in a client's message: its weight, parameters, and two a channel with statistics."""
    return 1 + sum(here.initial[k].numel() for k in here.ownership.travels)


def masked(here: Setting, update: Update, received: State, progress: Progress) -> Update:
    """A client's message: weight, parameters and statistics in one masked vector.

    Raises:
        UserError: a number that does not fit.
    """
    rule = here.privacy
    assert rule is not None
    table, peers = here.ownership, here.sampled(progress.round)
    weight = here.weight(update.examples)
    keys, pairs = parameter_keys(table), statistics_pairs(table)
    moved = flat(update.state, keys) - flat(received, keys)
    cpu = {k: v.cpu() for k, v in received.items()}
    mine = {k: v.cpu() for k, v in update.state.items()}
    vector = torch.cat([torch.ones(1).double(), moved, _statistics(here, mine, cpu, pairs)]) * weight
    words = encode(vector, rule.bits, len(peers))
    words = words + mask(update.user, peers, len(words), here.run.seed, progress.round)
    return Update(update.user, {MASKED: torch.from_numpy(words.view(np.int64))}, 1, update.loss)


def opened(here: Setting, updates: Sequence[Update], sent: State, round: int) -> Update:
    """The clients' mean as one update, from the sum of their messages.

    Args:
        here: the run's setting.
        updates: what all clients of the round sent.
        sent: what they were sent.
        round: counted from 1.

    Raises:
        UserError: a client's message is missing, so that masks do not cancel.
    """
    rule = here.privacy
    assert rule is not None
    if missing := set(here.sampled(round)) - {u.user for u in updates}:
        raise UserError(
            f"secure sums need every client of a round, and {sorted(missing)} did not reply in round {round}: run it "
            "again, or without secure=true"
        )
    vector = decode(total([u.state[MASKED].numpy().view(np.uint64) for u in updates]), rule.bits)
    table = here.ownership
    keys, pairs = parameter_keys(table), statistics_pairs(table)
    size = sum(sent[k].numel() for k in keys)
    mean = vector[1:] / vector[0]
    cpu = {k: v.cpu() for k, v in sent.items()}
    state = unflat(flat(sent, keys) + mean[:size], sent, keys)
    if pools_moments(here.strategy):
        state |= from_sums(mean[size:], cpu, pairs, 0.0)
    else:
        names = [k for pair in pairs for k in pair]
        state |= unflat(flat(cpu, names) + mean[size:], sent, names)
    state = {k: state[k].to(sent[k].device) for k in table.travels}
    return Update(EVERYBODY, state, 1, 0.0)


def _statistics(here: Setting, state: State, centre: State, pairs: Sequence[tuple[str, str]]) -> Tensor:
    if pools_moments(here.strategy):
        return to_sums(state, centre, pairs)
    names = [k for pair in pairs for k in pair]
    return flat(state, names) - flat(centre, names)


def pools_moments(strategy: NormStrategy) -> bool:
    """Whether a strategy pools clients' moments, rather than averaging means and variances."""
    return type(strategy).pool is GlobalPooled.pool


def require_summable(here: Setting) -> None:
    """Raise `UserError` unless sums over the clients are all that the strategy's server needs."""
    kind = type(here.strategy)
    if kind.pool not in (NormStrategy.pool, GlobalPooled.pool) or kind.views is not NormStrategy.views:
        raise UserError(
            f"privacy: secure sums show the server no single client, but {here.run.strategy} looks at each: choose a "
            "strategy that averages or pools, such as global-pooled, fedbn or silobn"
        )
    few = min(len(here.sampled(r)) for r in range(1, here.run.plan.rounds + 1))
    if few < 2:
        raise UserError("privacy: a secure sum of one client is that client's message: let at least 2 take part")

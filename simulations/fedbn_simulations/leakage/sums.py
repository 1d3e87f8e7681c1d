"""Information leaked by labeled sums: the sender's identity and its classes.

For each seen user, the sums of an alignment or a matched head (`fedbn.federation.labeled_sums`) are computed from an
earlier and from a later recording. *Re-identification.* A user is re-identified if the sums of the later recording, per
window and standardized over users, are nearest to its own earlier ones. *Label shares.* The counts show how often a
user does what: the error is the mean absolute difference between the sent and the true shares of the classes, and the
control is to guess the mean of all users. Only first rounds are observed, in which clients have not been aligned.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from fedbn.errors import UserError
from fedbn.federation.context import RunContext
from fedbn.federation.labeled_sums import client_sums, parse_sums_method, require_sums
from fedbn.federation.run import Run
from fedbn.federation.setup import build_context
from fedbn.nn.roles import State
from fedbn.online.sums import SumsMethod
from fedbn_simulations.engines.execute import execute


@dataclass(frozen=True)
class SumsLeak:
    """Information leaked by the sums of one method under one protection.

    Attributes:
        method: text of the alignment or head.
        privacy: text of the protection.
        bytes: size of one message.
        found: share of re-identified users.
        users: number of users.
        share_error: mean error of the shares of the classes.
        guess_error: the same for the mean of all users.
    """

    method: str
    privacy: str
    bytes: int
    found: float
    users: int
    share_error: float
    guess_error: float

    @property
    def chance(self) -> float:
        """Share of re-identified users that is expected by guessing."""
        return 1 / self.users


def measure_sums(run: Run, texts: Sequence[str], controls: Sequence[str]) -> list[SumsLeak]:
    """Train a run's model without protection and measure what the sums of its seen users reveal.

    Args:
        run: the training run.
        texts: alignments and heads.
        controls: texts of protections of the sums; an empty text means none.

    Raises:
        UserError: the run is invalid, a method does not fit it, it has too few users, or a control hides all messages.
    """
    run = replace(run, privacy="").resolved()
    ctx = build_context(run)
    require_sums(ctx, texts)
    if len(ctx.population.seen) < 2:
        raise UserError("re-identification needs at least two seen users: choose a scenario with more")
    outcome = execute(run, "grid:stacked")
    served = ctx.assemble(outcome.server.serving, None)
    out = []
    for text in texts:
        method = parse_sums_method(text)
        for control in controls:
            protected = build_context(replace(run, privacy=control).resolved())
            if protected.privacy is not None and protected.privacy.secure:
                raise UserError("secure=true hides the sums of single clients: leave it out")
            out.append(_leak(protected, protected.load(served).eval(), method, text))
    return out


def _leak(ctx: RunContext, model: nn.Module, method: SumsMethod, text: str) -> SumsLeak:
    users = ctx.population.users
    later = replace(ctx.population, users=tuple(replace(u, train=u.test) for u in users))
    # Another round number draws other noise.
    rounds = [(ctx, 0), (replace(ctx, population=later), 1)]
    sent = [[client_sums(c, i, model, method, number, {}) for i in ctx.population.seen] for c, number in rounds]
    early, late = (_standardized(messages) for messages in sent)
    found = float((torch.cdist(late, early).argmin(1) == torch.arange(len(late))).double().mean())
    classes = len(ctx.population.classes)
    true = torch.stack([torch.bincount(users[i].train.y, minlength=classes).double() for i in ctx.population.seen])
    true = true / true.sum(1, keepdim=True)
    counts = torch.stack([message["n"] for message in sent[0]]).clamp_min(0)
    shares = counts / counts.sum(1, keepdim=True).clamp_min(1e-12)
    error, guess = (float((estimate - true).abs().mean()) for estimate in (shares, true.mean(0)))
    size = sum(v.numel() * v.element_size() for v in sent[0][0].values())
    return SumsLeak(text, ctx.run.privacy, size, found, len(late), error, guess)


def _standardized(messages: Sequence[State]) -> Tensor:
    """Sums per window as rows, standardized over users."""
    rows = []
    for message in messages:
        windows = message["n"].sum().abs().clamp_min(1e-12)
        rows.append(torch.cat([message["first"].flatten(), message["second"].flatten()]) / windows)
    values = torch.stack(rows)
    return (values - values.mean(0)) / values.std(0).clamp_min(1e-12)

"""The trained model of a user, or of the server, as a plain network."""

from __future__ import annotations

from torch import nn

from fedbn.errors import UserError, unknown
from fedbn.federation.client import user_state
from fedbn.federation.context import RunContext
from fedbn.federation.server import Outcome
from fedbn.nn.plain import copy_model
from fedbn.nn.roles import Role


def trained_model(ctx: RunContext, outcome: Outcome, user: str | None = None) -> nn.Module:
    """Copy of a trained network, in evaluation mode.

    Args:
        ctx: the context of the run.
        outcome: its outcome.
        user: name of a user, whose own (local) entries are included, personalized as in the evaluation; None for the
            model of the server.

    Raises:
        UserError: an unknown user, a strategy that shares no model, or an engine that does not return client states.

    >>> from fedbn.config import Plan
    >>> from fedbn.federation import federate
    >>> from fedbn.federation.run import Run
    >>> from fedbn.federation.setup import build_context
    >>> run = Run("digits8", "fedbn", plan=Plan(rounds=1))
    >>> trained_model(build_context(run), federate(run)).training
    False
    """
    if user is None:
        if not ctx.ownership.shares(Role.BODY):
            raise UserError(f"strategy {ctx.run.strategy!r} shares no model: name a user, as in model(user=NAME)")
        return copy_model(ctx.load(ctx.assemble(outcome.server.serving, None))).eval()
    names = [u.name for u in ctx.population.users]
    if user not in names:
        raise unknown("user", user, names)
    index = names.index(user)
    own = [name for name in ctx.ownership.retained if ctx.ownership.roles[name] is not Role.COUNTER]
    if own and index in outcome.trained and index not in outcome.client_states:
        raise UserError(
            f"the entries that user {user!r} keeps under {ctx.run.strategy!r} are unknown, because this engine does "
            "not return the states of clients: use engine='grid'"
        )
    received = outcome.server.state_for(ctx, index, serving=True)
    return copy_model(ctx.load(user_state(ctx, index, received, outcome.client_states.get(index)))).eval()

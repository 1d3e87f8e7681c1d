"""Federated training and evaluation: runs, contexts, clients, server, and the reference loop."""

from fedbn.federation.loop import federate
from fedbn.federation.server import Outcome

__all__ = ["Outcome", "federate"]

"""Claims of papers, tested again on small data."""

from fedbn_simulations.claims.claim import Claim, Effect, claims

__all__ = ["Claim", "Effect", "claims"]

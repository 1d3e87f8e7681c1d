"""Strategies: how normalization is treated in a federation. One strategy per file."""

from fedbn.strategies.base import NormStrategy, strategies, strategy
from fedbn.strategies.ownership import LOCAL, SEEDED, SHARED, Owner

__all__ = ["LOCAL", "SEEDED", "SHARED", "NormStrategy", "Owner", "strategies", "strategy"]

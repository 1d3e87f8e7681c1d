"""Normalization strategies for federated learning, one per module; all modules are discovered automatically."""

from fedbn.strategies.base import NormStrategy, strategies, strategy
from fedbn.strategies.ownership import LOCAL, SEEDED, SHARED, Owner

__all__ = ["LOCAL", "SEEDED", "SHARED", "NormStrategy", "Owner", "strategies", "strategy"]

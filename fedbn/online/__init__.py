"""Statistics that follow users: a bank of thousands of users in one network, rules, states as values."""

from fedbn.online.blocks import follow_rule, predict_online
from fedbn.online.personalized import Personalized, personalize
from fedbn.online.prior import LayerPrior, population_prior, source_prior
from fedbn.online.rule import Rule, rule
from fedbn.online.state import BNState
from fedbn.online.stores import DirectoryStore, SQLiteStore, Store

__all__ = [
    "BNState",
    "DirectoryStore",
    "LayerPrior",
    "Personalized",
    "Rule",
    "SQLiteStore",
    "Store",
    "follow_rule",
    "personalize",
    "population_prior",
    "predict_online",
    "rule",
    "source_prior",
]

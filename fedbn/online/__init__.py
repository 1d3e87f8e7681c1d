"""Statistics that follow users: a bank of thousands of users in one network, rules, states as values."""

from fedbn.online.alignments.aligner import Aligner, fit_alignment
from fedbn.online.alignments.base import Alignment
from fedbn.online.matched import Matched, MatchedHead, fit_matched_head
from fedbn.online.methods import rule
from fedbn.online.personalized import Personalized, personalize
from fedbn.online.prior import LayerPrior, population_prior, source_prior
from fedbn.online.rules.base import Rule
from fedbn.online.state import BNState
from fedbn.online.statistics import State
from fedbn.online.stores import DirectoryStore, SQLiteStore, Store
from fedbn.online.stream import follow_rule, predict_online

__all__ = [
    "Aligner",
    "Alignment",
    "BNState",
    "DirectoryStore",
    "LayerPrior",
    "Matched",
    "MatchedHead",
    "Personalized",
    "Rule",
    "SQLiteStore",
    "State",
    "Store",
    "fit_alignment",
    "fit_matched_head",
    "follow_rule",
    "personalize",
    "population_prior",
    "predict_online",
    "rule",
    "source_prior",
]

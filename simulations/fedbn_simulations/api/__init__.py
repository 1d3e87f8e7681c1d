"""Python API of the commands, exported as ``fedbn.compare`` and so on; every input can be a text or an object."""

from fedbn_simulations.api.experiments import adapt, compare, federate, load
from fedbn_simulations.api.results import AdaptationResult, ComparisonResult, FederationResult, Plot

__all__ = [
    "AdaptationResult",
    "ComparisonResult",
    "FederationResult",
    "Plot",
    "adapt",
    "compare",
    "federate",
    "load",
]

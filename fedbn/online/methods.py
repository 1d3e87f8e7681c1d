"""Rules on statistics and test-time methods by one function, as ``fedbn.rule``."""

from __future__ import annotations

from fedbn.online.rules.base import Rule, rules
from fedbn.plugins import parse
from fedbn.tta import Method, methods


def rules_and_methods() -> dict[str, type[Rule | Method]]:
    """All rules and test-time methods, by name."""
    return {**rules(), **methods()}


def rule(text: str) -> Rule | Method:
    """Rule on statistics (for `personalize`) or test-time method (for `fedbn.tta.Adapter`); `fedbn.adapt` accepts both.

    Raises:
        UserError: unknown name or option (the closest one is suggested), or a value out of range.

    >>> rule("pseudo:n0=64").n0, rule("tent:lr=0.01").lr
    (64.0, 0.01)
    """
    return parse(text, "rule or method", rules_and_methods(), (Rule, Method))

"""No adaptation: the baseline of all rules."""

from __future__ import annotations

from dataclasses import dataclass

from fedbn.online.rules.base import Rule


@dataclass(frozen=True)
class Source(Rule):
    """Always normalizes by the source's statistics, or by those of a calibrated user."""

    name = "source"
    about = "never adapts"
    learns = False

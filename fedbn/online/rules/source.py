"""No adaptation: the baseline that no rule should fall below."""

from __future__ import annotations

from dataclasses import dataclass

from fedbn.online.rules.base import Rule


@dataclass(frozen=True)
class Source(Rule):
    """Normalize by the source's statistics, or by those a user was calibrated to, for ever."""

    name = "source"
    about = "never adapts"
    learns = False

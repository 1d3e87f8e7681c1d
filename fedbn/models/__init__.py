"""Built-in networks, one per module."""

from fedbn.models.base import Factory, Network, build, factory, models

__all__ = ["Factory", "Network", "build", "factory", "models"]

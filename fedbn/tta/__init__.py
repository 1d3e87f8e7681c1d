"""Test-time adaptation methods. One method per file."""

from fedbn.tta.base import Adapter, Method, method, methods

__all__ = ["Adapter", "Method", "method", "methods"]

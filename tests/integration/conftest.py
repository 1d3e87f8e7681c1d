from __future__ import annotations

import uuid

import pytest

from tests.integration.processes import MARK, kill_marked, marked


@pytest.fixture
def mark(monkeypatch):
    """A mark that all processes of a test inherit; no such process may outlive the test."""
    mark = uuid.uuid4().hex
    monkeypatch.setenv(MARK, mark)
    yield mark
    monkeypatch.delenv(MARK)
    remaining = marked(mark)
    kill_marked(mark)
    assert not remaining

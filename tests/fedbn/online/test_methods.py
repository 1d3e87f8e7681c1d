from __future__ import annotations

import pytest
import torch
from torch import nn

import fedbn
from fedbn.errors import UserError
from fedbn.online import Rule, personalize
from fedbn.online.rules.base import rule as statistics_rule
from fedbn.plugins import render
from fedbn.tta import Adapter, Method, methods


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).eval()


@pytest.mark.parametrize("name", methods())
def test_rule_returns_test_time_methods(name):
    found = fedbn.rule(name)
    assert isinstance(found, Method)
    assert render(found) == name
    assert isinstance(fedbn.rule("pseudo"), Rule)


def test_rule_method_adapts_as_an_object():
    x = torch.randn(8, 3)
    out = Adapter(fedbn.rule("tent:lr=0.5"), network(), x)(x)
    assert out.shape == (8, 2)


@pytest.mark.parametrize("given", ["tent", "tent:lr=0.01", fedbn.rule("tent")])
def test_personalize_refuses_test_time_methods(given):
    with pytest.raises(UserError, match="^'tent' is a test-time method, .*: compare it by `fedbn adapt --rules tent`"):
        personalize(network(), given)


def test_statistics_rule_refuses_test_time_methods():
    with pytest.raises(UserError, match="'lame' is a test-time method"):
        statistics_rule("lame:neighbors=3")
    with pytest.raises(UserError, match="unknown rule or method 'tnet'"):
        fedbn.rule("tnet")

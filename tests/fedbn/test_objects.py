"""References to objects: importable ones by name, others by content."""

from __future__ import annotations

import sys
import types
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import nn

from fedbn import objects
from fedbn.errors import UserError
from fedbn.objects import in_memory, load_objects, reference, require_importable, resolve, save_objects
from fedbn.online.rules.base import Rule, rule, rule_text
from fedbn.personalization.base import Personalization
from fedbn.personalization.treatment import Treatment, treatment, treatment_text
from fedbn.plugins import render
from fedbn.strategies.base import NormStrategy
from fedbn.strategies.fedbn import FedBN
from fedbn.strategies.groupnorm import GroupNorm


@dataclass(frozen=True)
class Mine(NormStrategy):
    name: ClassVar[str] = "mine"
    alpha: float = 0.3
    powers: tuple[int, ...] = (1, 2)


@dataclass(frozen=True)
class MyMethod(Personalization):
    name: ClassVar[str] = "my-method"
    extra: object = None


@dataclass(frozen=True, kw_only=True)
class MyRule(Rule):
    name: ClassVar[str] = "my-rule"
    rate: float = 0.5


class Nameless(NormStrategy):
    pass


HOME = "tests.fedbn.test_objects"


@pytest.fixture
def registry(monkeypatch):
    """A process without registered objects."""

    def forget():
        monkeypatch.setattr(objects, "_objects", {})
        monkeypatch.setattr(objects, "_references", {})

    forget()
    return forget


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ("fedbn", "fedbn"),
        (FedBN, "fedbn"),
        (GroupNorm(groups=4), "groupnorm:groups=4"),
        (Mine, f"{HOME}:Mine"),
        (Mine(alpha=0.5, powers=(3, 4)), f"{HOME}:Mine:alpha=0.5:powers=3+4"),
        (MyMethod, f"global-naive+{HOME}:MyMethod"),
        (Treatment(FedBN(), MyMethod()), f"fedbn+{HOME}:MyMethod"),
    ],
)
def test_treatment_text_names_objects(given, text):
    assert treatment_text(given) == text


def test_names_of_plugins_do_not_depend_on_earlier_references():
    assert str(treatment("fedbn.strategies.groupnorm:GroupNorm:groups=4")) == "groupnorm:groups=4"
    assert str(treatment("groupnorm:groups=4")) == "groupnorm:groups=4"


def test_a_class_that_is_defined_again_has_the_same_text():
    def cell():
        @dataclass(frozen=True)
        class Local(NormStrategy):
            name: ClassVar[str] = "local-class"
            share: float = 0.5

        return Local

    first = cell()(share=0.25)
    text = treatment_text(first)
    second = cell()(share=0.25)
    assert treatment_text(second) == text == treatment_text(first) == render(first)
    assert text.endswith(":share=0.25")
    assert treatment_text(cell()) != text


def test_texts_of_objects_are_parsed_in_a_new_process(registry):
    text, method, online = treatment_text(Mine(alpha=0.5)), treatment_text(MyMethod), rule_text(MyRule(rate=0.25))
    registry()
    assert treatment(text).norm == Mine(alpha=0.5)
    assert type(treatment(method).personal) is MyMethod
    assert rule(online) == MyRule(rate=0.25)
    assert (str(treatment(text)), render(rule(online))) == (text, online)


def test_objects_with_other_fields_are_named_by_content():
    text = treatment_text(MyMethod(extra={"a": [1, 2]}))
    assert text.startswith("global-naive+memory:MyMethod-")
    assert treatment(text).personal == MyMethod(extra={"a": [1, 2]})
    assert str(treatment(text)) == text
    assert treatment_text(MyMethod(extra={"a": [1, 2]})) == text
    assert treatment_text(MyMethod(extra={"a": [1, 3]})) != text


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (3, "strategy must be a text or a NormStrategy, not 3"),
        (nn.ReLU, "strategy must be a text or a NormStrategy"),
        (Nameless, "class Nameless has no name: add name = 'nameless' to it"),
    ],
)
def test_treatment_text_rejects_other_objects(given, message):
    with pytest.raises(UserError, match=message):
        treatment_text(given)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("fedbm:mine", "Did you mean 'fedbn'"),
        ("no.such.module:Mine", "strategy 'no.such.module:Mine': cannot import 'no.such.module'"),
        (f"{HOME}:Nine", f"in {HOME} 'Nine'. Did you mean 'Mine'"),
        (f"{HOME}:Mine:alfa=1", "Did you mean 'alpha'"),
        (f"{HOME}:MyRule", "must be a subclass of NormStrategy"),
        ("memory:Mine-0123456789ab", "is an object that this process does not have: create the same object"),
        (f"fedbn+{HOME}:Mine", "must be a subclass of Personalization"),
    ],
)
def test_treatment_rejects_wrong_references(text, message):
    with pytest.raises(UserError, match=message):
        treatment(text)


def test_saved_objects_are_loaded_with_their_arrays(registry, tmp_path):
    model = nn.Linear(3, 2)
    text, other = reference(model), reference({"unused": lambda: 1})
    save_objects(tmp_path / "objects.pt", [f'{{"model": "{text}"}}'])
    registry()
    load_objects(tmp_path / "objects.pt")
    assert torch.equal(resolve(text, "model").weight, model.weight)
    with pytest.raises(UserError, match="does not have"):
        resolve(other, "value")


def test_save_objects_refuses_what_workers_cannot_import(tmp_path):
    with pytest.raises(UserError, match=r"worker processes cannot import what memory:lambda-\w+ needs .*workers=1"):
        save_objects(tmp_path / "objects.pt", [reference(lambda shape, classes: nn.Linear(2, 2))])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: lambda: 1, "is a lambda"),
        (lambda: type("Local", (), {"__qualname__": "make.<locals>.Local"}), "Local is nested in a function"),
        (lambda: nn.Linear(1, 1), r"memory:Linear-\w+ is an object of this process"),
    ],
)
def test_require_importable_names_the_object(make, message):
    text = reference(make())
    assert in_memory(f"fedbn {text}") == [text]
    with pytest.raises(UserError, match=f"engine ray starts processes .*{message}.*'module:name'"):
        require_importable("engine ray", text)
    require_importable("engine ray", "fedbn", f"{HOME}:Mine")


def test_resolve_returns_the_definition_of_a_reloaded_module(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "edited_module.py").write_text("def make():\n    return 1\n")
    first = resolve("edited_module:make", "model")
    monkeypatch.setitem(sys.modules, "edited_module", types.SimpleNamespace(make=lambda: 2))
    assert [first(), resolve("edited_module:make", "model")()] == [1, 2]

"""Tables of a comparison fit 80 columns without broken words, and use the room of a wide terminal."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from fedbn_simulations.report.terminal import show
from fedbn_simulations.results.comparison import Comparison
from fedbn_simulations.results.inference import MIN_USERS
from fedbn_simulations.results.summary import sentences
from tests.simulations.results.test_comparison import write

MEANS = {"global-naive": 0.80, "global-recalibrated": 0.85, "weight-standardization:groups=4+fedrep": 0.82}


@pytest.fixture(scope="module")
def comparison(tmp_path_factory):
    directory = tmp_path_factory.mktemp("comparison")
    write(directory, MEANS)
    return Comparison.load(directory)


def printed(comparison, width):
    console = Console(file=io.StringIO(), width=width)
    show(comparison, console)
    return console.file.getvalue()


def test_show_fits_80_columns_without_broken_words(comparison):
    text = printed(comparison, 80)
    assert max(map(len, text.splitlines())) <= 80
    words = text.split()
    assert {"FedAvg", "(recalibrated", "standardization", "groups=4", "FedRep"} <= set(words)
    assert not any(word.startswith("[") and not word.endswith(",") for word in words if word != "[95")


def test_show_leaves_out_columns_before_it_breaks_words(comparison):
    assert "Left out in this width: lr, seconds, affine" in " ".join(printed(comparison, 60).split())
    assert "Left out" not in printed(comparison, 200)


def test_show_has_labels_if_they_fit(comparison):
    assert "global-naive" in printed(comparison, 240)
    assert "global-naive" not in printed(comparison, 80)


@pytest.mark.parametrize("users", [2, MIN_USERS - 1, MIN_USERS])
def test_sentences_name_too_few_users(tmp_path, users):
    write(tmp_path, {"global": 0.80, "fedbn": 0.81}, users=users, unseen=2)
    own, _, unseen = sentences(Comparison.load(tmp_path))
    assert (f"too few users ({users}) to test" in own) is (users < MIN_USERS)
    assert "too few users (2) to test" in unseen


def test_objects_have_the_names_of_their_classes(tmp_path):
    labels = ["global-naive", "memory:MyBN-eda7c51eaf03", "memory:MyBN-0b11c51eaf03:alpha=1", "mine:MyBN"]
    write(tmp_path, dict(zip(labels, (0.7, 0.8, 0.75, 0.6))), seeds=(0,))
    comparison = Comparison.load(tmp_path)
    assert list(comparison.names.values()) == ["FedAvg (naive BN)", "MyBN (eda7)", "MyBN, alpha=1", "mine:MyBN"]
    assert set(comparison.wide().index.get_level_values("strategy")) == set(comparison.names.values())
    assert set(comparison.matrix()["strategy"]) == set(labels)
    assert sentences(comparison)[0].startswith("Own test: MyBN (eda7) .")
    for text in (printed(comparison, 80), repr(comparison), comparison.to_markdown()):
        assert "MyBN (eda7)" in text
        assert "memory:" not in text

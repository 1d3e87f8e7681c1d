"""Classes and users from labels and names of every kind."""

from __future__ import annotations

import numpy as np
import pytest

from fedbn.data.labels import encode_labels, encode_names, label_notices, name_notices
from tests.fedbn.helpers import rejects

Y = np.array([0, 2, 1, 2, 0, 1])


@pytest.mark.parametrize(
    ("labels", "classes"),
    [
        (Y + 1, ("1", "2", "3")),
        (Y - 1, ("-1", "0", "1")),
        (Y.astype(np.uint8), ("0", "1", "2")),
        (Y + 1.0, ("1", "2", "3")),
        (np.array([3, 20, 100])[Y], ("3", "20", "100")),
        (np.array([2**60, 2**60 + 1, 2**60 + 2])[Y], tuple(str(2**60 + i) for i in range(3))),
        (np.array(["9", "10", "11"])[Y], ("9", "10", "11")),
        (np.array(["lie", "sit", "walk"])[Y], ("lie", "sit", "walk")),
        (np.array([b"lie", b"sit", b"walk"])[Y], ("lie", "sit", "walk")),
        (np.array(["lie", " sit", "walk "], object)[Y], ("lie", "sit", "walk")),
        (np.array(["None", "null", "walk"])[Y], ("None", "null", "walk")),
        (np.array([1, "2", "walk"], object)[Y], ("1", "2", "walk")),
        (Y[:, None], ("0", "1", "2")),
        (np.eye(3)[Y], ("0", "1", "2")),
        (np.eye(3, dtype=bool)[Y], ("0", "1", "2")),
    ],
)
def test_labels_become_indices_in_sorted_order(labels, classes):
    codes, found = encode_labels(labels, "own")
    assert (codes.tolist(), found) == (Y.tolist(), classes)


def test_labels_of_truth_values_have_names():
    codes, found = encode_labels(Y > 0, "own")
    assert (codes.tolist(), found) == ([0, 1, 1, 1, 0, 1], ("False", "True"))


def test_labels_with_known_classes_do_not_change():
    assert encode_labels(np.array([2, 0]), "own", ("a", "b", "c"))[0].tolist() == [2, 0]
    assert encode_labels(np.array(["c", "a"]), "own", ("a", "b", "c"))[0].tolist() == [2, 0]
    rejects("labels run from 1 to 3, but classes must be numbered 0 to 2", encode_labels, Y + 1, "own", ("a", "b", "c"))
    rejects("label 'd' is not among the classes a, b", encode_labels, np.array(["d"]), "own", ("a", "b"))


def nested(*rows):
    out = np.empty(len(rows), object)
    out[:] = rows
    return out


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.array([0.5, 1.0]), r"labels are real numbers \(0.5 in row 0\), as for regression"),
        (np.array([0.0, np.inf]), "label is infinite in row 1"),
        (np.array([0.0, np.nan]), r"label is missing in 1 rows \(first: row 1\)"),
        (np.array(["a", ""]), r"label is missing in 1 rows \(first: row 1\)"),
        (np.array(["1", "2", "null"]), "label is 'null' in row 2 and a number elsewhere"),
        (np.array(["0.25", "1"]), r"labels are real numbers \(0.25 in row 0\)"),
        (np.arange(6), "labels have 6 different values in 6 rows, as for regression or an identifier"),
        (np.zeros(6, int), "all labels are '0', but at least two classes are needed"),
        (np.ones((6, 2), int), r"labels have shape \[6, 2\] and row 0 has 2 classes \(multi-label\)"),
        (np.eye(2)[[0, 1]] * 0.5, r"labels have shape \[2, 2\], as for regression with several outputs"),
        (np.zeros((6, 4, 4), int), "as for segmentation"),
        (nested([0], [0, 1]), r"lists of different lengths \(multi-label\)"),
        (np.array(["2020-01-01"], "M8[D]"), "labels have type"),
    ],
)
def test_labels_that_are_no_classes_are_rejected(labels, message):
    rejects(message, encode_labels, labels, "own")


def test_label_notices_give_the_mapping_once():
    assert label_notices(("0", "1"), "own") == []
    assert label_notices(("1", "2"), "own") == ["own: labels 1, 2 are classes 0, 1"]
    many = label_notices([f"c{i}" for i in range(20)], "own")
    assert many == ["own: labels c0, c1, c2, c3, c4, c5, c6, c7 are classes 0, 1, 2, 3, 4, 5, 6, 7, ... (20 classes)"]
    assert "labels 'Walk' and 'walk' differ only in case" in label_notices(("Walk", "walk"), "own")[1]


@pytest.mark.parametrize(
    ("names", "wanted"),
    [
        (np.array([b"bob", b"ana"]), ["ana", "bob"]),
        (np.array([b"bob", b"ana"], object), ["ana", "bob"]),
        (np.array([" bob", "ana "]), ["ana", "bob"]),
        (np.array([10, 9]), ["9", "10"]),
        (np.array([10.0, 9.0]), ["9", "10"]),
        (np.array([2**60 + 1, 2**60]), [str(2**60), str(2**60 + 1)]),
        (np.array([2**70, 9], object), ["9", str(2**70)]),
        (np.array([[10], [9]]), ["9", "10"]),
        (np.array(["Z\xeb".encode("latin-1"), b"a"]), ["Z\xeb", "a"]),
    ],
)
def test_names_are_sorted_texts(names, wanted):
    found, codes = encode_names(names, "user")
    assert sorted(found) == sorted(wanted)
    assert [found[c] for c in codes] == ([wanted[1], wanted[0]] if wanted != ["Z\xeb", "a"] else wanted)


def test_names_that_are_unclear_are_rejected_or_reported():
    rejects("user is a number that is too large to be exact", encode_names, np.array([1e18, 2e18]), "user")
    rejects("user is missing in 1 rows", encode_names, np.array(["ana", None], object), "user")
    assert name_notices(["Ana", "ana", "bob"], "own") == [
        "own: users 'Ana' and 'ana' differ only in case; they count as different users"
    ]

"""Text tables in the forms that programs write them."""

from __future__ import annotations

import gzip
import zipfile

import pytest

from fedbn.data.folders import read
from fedbn.data.tables import read_text_table
from tests.fedbn.helpers import rejects

WANTED = {"x0": [1.5, 2.25], "x1": [2, 3], "y": [1, 0], "user": ["ana", "bob"]}


def write(path, content, encoding="utf-8"):
    path.write_bytes(content if isinstance(content, bytes) else content.encode(encoding))
    return path


@pytest.mark.parametrize(
    "text",
    [
        "x0,x1,y,user\n1.5,2,1,ana\n2.25,3,0,bob\n",
        "x0,x1,y,user\r\n1.5,2,1,ana\r\n2.25,3,0,bob",
        "x0,x1,y,user\r1.5,2,1,ana\r2.25,3,0,bob\r",
        "x0;x1;y;user\n1.5;2;1;ana\n2.25;3;0;bob\n",
        "x0\tx1\ty\tuser\n1.5\t2\t1\tana\n2.25\t3\t0\tbob\n",
        "x0|x1|y|user\n1.5|2|1|ana\n2.25|3|0|bob\n",
        "x0 x1 y user\n1.5   2 1 ana\n2.25 3 0 bob\n",
        "x0, x1, y, user\n1.5, 2, 1, ana\n2.25, 3, 0, bob\n",
        '"x0","x1","y","user"\n"1.5","2","1","ana"\n"2.25","3","0","bob"\n',
        "sep=;\nx0;x1;y;user\n1.5;2;1;ana\n2.25;3;0;bob\n",
        "# x0,x1,y,user\n1.5,2,1,ana\n2.25,3,0,bob\n",
        "# written on Monday\n# by a phone\nx0,x1,y,user\n1.5,2,1,ana\n2.25,3,0,bob\n",
        "\nx0,x1,y,user\n\n1.5,2,1,ana\n2.25,3,0,bob\n\n",
        "x0,x1,y,user,\n1.5,2,1,ana,\n2.25,3,0,bob,\n",
        "x0,x1,y,user\n1.5,2,1,ana,\n2.25,3,0,bob,\n",
        ",x0,x1,y,user\n0,1.5,2,1,ana\n1,2.25,3,0,bob\n",
        '"x0","x1","y","user"\n"1",1.5,2,1,"ana"\n"2",2.25,3,0,"bob"\n',
        '"x0" "x1" "y" "user"\n"1" 1.5 2 1 "ana"\n"2" 2.25 3 0 "bob"\n',
        'x0,x1,y,user,note\n1.5,2,1,ana,"at home; quiet"\n2.25,3,0,bob,"out; loud"\n',
    ],
)
def test_tables_read_separators_and_headers(tmp_path, text):
    frame, has_header, notices = read_text_table(write(tmp_path / "own.csv", text))
    assert has_header
    assert not notices
    assert {name: frame[name].tolist() for name in WANTED} == WANTED


@pytest.mark.parametrize(
    ("text", "values", "notice"),
    [
        ("x;y\n1,5;a\n-0,25;b\n3;c\n", [1.5, -0.25, 3], "decimal commas"),
        ("x;y\n1.234,5;a\n2,25;b\n", [1234.5, 2.25], "decimal commas"),
        ("x;y\n0,123;a\n1,234;b\n", [0.123, 1.234], "decimal commas"),
        ('x,y\n"1,5",a\n2,b\n', [1.5, 2], "decimal commas"),
        ('x,y\n"1,234",a\n56,b\n', [1234, 56], "commas between thousands"),
        ('x,y\n"1,234.5",a\n6,b\n', [1234.5, 6], "commas between thousands"),
    ],
)
def test_tables_read_decimal_and_thousands_commas(tmp_path, text, values, notice):
    frame, _, notices = read_text_table(write(tmp_path / "own.csv", text))
    assert frame["x"].tolist() == values
    assert notices == [f"own.csv: numbers are read with {notice}"]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_tables_read_encodings(tmp_path, encoding):
    frame, _, notices = read_text_table(write(tmp_path / "own.csv", "x,user\n1,Zoë\n2,bob\n", encoding))
    assert (list(frame.columns), frame["user"].tolist(), notices) == (["x", "user"], ["Zoë", "bob"], [])


def test_tables_tell_that_the_encoding_is_guessed(tmp_path):
    frame, _, notices = read_text_table(write(tmp_path / "own.csv", "x,user\n1,Zoë\n2,bob\n", "latin-1"))
    assert frame["user"].tolist() == ["Zoë", "bob"]
    assert notices == ["own.csv is not UTF-8 and is read as cp1252; if names look wrong, save it as UTF-8"]


def test_tables_read_compressed_files(tmp_path):
    text = b"x,user\n1,ana\n2,bob\n"
    with zipfile.ZipFile(tmp_path / "own.csv.zip", "w") as archive:
        archive.writestr("own.csv", text)
    write(tmp_path / "own.csv.gz", gzip.compress(text))
    for name in ("own.csv.zip", "own.csv.gz"):
        assert read(tmp_path / name).get("x").tolist() == [1, 2]
    with zipfile.ZipFile(tmp_path / "own.csv.zip", "a") as archive:
        archive.writestr("other.csv", text)
    rejects("is an archive of 2 files; unpack it into a directory", read, tmp_path / "own.csv.zip")


@pytest.mark.parametrize(
    "text", ["1.5,2,1,ana\n2.25,3,0,bob\n", "1,5;2,5;3,5;1;ana\n2,25;3,5;1,5;0;bob\n", "0,1,ana\n0,2,ana\n"]
)
def test_tables_without_header_are_numbered(tmp_path, text):
    columns = read(write(tmp_path / "own.csv", text))
    count = len(columns.names)
    assert columns.names == [str(i) for i in range(count)]
    assert len(columns.get("0")) == 2
    message = (
        rf"its columns are numbered from 0: name them by numbers, for instance x=0..{count - 3}:y={count - 2}:user="
    )
    rejects(message, columns.column, "user", "user")


def test_tables_with_numbers_as_names_have_a_header(tmp_path):
    columns = read(write(tmp_path / "own.csv", "0,1,y,user\n1.5,2,1,ana\n2.25,3,0,bob\n"))
    assert columns.names == ["0", "1", "y", "user"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "own.csv is empty; save rows with a header line"),
        ("x0,x0,y\n1,2,0\n", "column 'x0' occurs twice; rename one"),
        ("x0,y\n1,0,7\n2,1\n", "some rows have 1 more fields than the header; name every column"),
        ("x0,y\n1,0\n2,1,7\n", "some rows have 1 more fields than the header; name every column"),
        ('x0,y\n"1,0\n2,1\n', "own.csv cannot be read"),
    ],
)
def test_tables_reject_damaged_files(tmp_path, text, message):
    rejects(message, read, write(tmp_path / "own.csv", text))


def test_tables_keep_class_names_that_look_missing(tmp_path):
    columns = read(write(tmp_path / "own.csv", "x,y\n1,null\n2,None\n3,walk\n"))
    assert columns.get("y").tolist() == ["null", "None", "walk"]

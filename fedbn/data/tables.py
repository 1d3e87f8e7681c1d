"""Read text tables (csv, tsv, txt) whatever their encoding, separator, decimal mark and header."""

from __future__ import annotations

import bz2
import codecs
import csv
import gzip
import io
import lzma
import re
import zipfile
from pathlib import Path

import pandas as pd

from fedbn.errors import UserError

SEPARATORS = ("\t", ";", "|", ",")
SAMPLE_LINES = 100
BOMS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
MISSING = ["", "NA", "N/A", "n/a", "#N/A", "<NA>", "NaN", "nan", "-nan", "-NaN"]
"""Texts of missing values. ``None`` and ``null`` are not among them, because they are names of classes."""

GROUPED = r"[-+]?\d{1,3}(?:,\d{3})*"
THOUSANDS_COMMA = r"[-+]?\d{1,3}(?:,\d{3})+\.\d+|[-+]?\d{1,3}(?:,\d{3}){2,}"
THOUSANDS_POINT = r"[-+]?\d{1,3}(?:\.\d{3})+,\d+"


def read_text_table(path: Path) -> tuple[pd.DataFrame, bool, list[str]]:
    """Read a text table.

    Args:
        path: a text file, possibly compressed (gz, bz2, xz, zip).

    Returns:
        The table, whether it has a header (otherwise columns are numbered from 0), and notices about the reading.

    Raises:
        UserError: if the file is empty, or column names occur twice.
    """
    text, notices = _decode(_decompress(path), path.name)
    if named := re.match(r"sep=(.)\n", text):  # written by Excel
        text = text[named.end() :]
    comments = re.match(r"(?:#[^\n]*\n)*", text)[0]  # type: ignore[index]
    text = text[len(comments) :]
    lines = _sample(text)
    if not lines:
        raise UserError(f"{path.name} is empty; save rows with a header line such as x0,x1,y,user")
    separator = named[1] if named else _separator(lines)
    rows = _fields(lines, separator)
    if comments:  # NumPy writes the header as a comment
        above = comments.splitlines()[-1].lstrip("# ")
        if not _is_header(rows) and len(fields := _fields([above], separator)[0]) == len(rows[0]):
            text, rows = f"{above}\n{text}", [fields, *rows]
    has_header = _is_header(rows)
    if has_header:
        _refuse_duplicates([*filter(None, (name.strip() for name in rows[0]))], path.name)
        text = _complete_header(text, rows, separator, path.name)
    options = {
        "sep": separator or r"\s+",
        "header": 0 if has_header else None,
        "skipinitialspace": True,
        "keep_default_na": False,
        "na_values": MISSING,
        "low_memory": False,
    }
    frame = pd.read_csv(io.StringIO(text), **options)
    if marks := _marks(frame, separator):
        frame = pd.read_csv(io.StringIO(text), **options, **marks)
        comma = "decimal commas" if marks.get("decimal") == "," else "commas between thousands"
        notices.append(f"{path.name}: numbers are read with {comma}")
    frame.columns = [str(name).strip() for name in frame.columns]
    return frame, has_header, notices


def _decompress(path: Path) -> bytes:
    data = path.read_bytes()
    for magic, module in ((b"\x1f\x8b", gzip), (b"BZh", bz2), (b"\xfd7zXZ\x00", lzma)):
        if data.startswith(magic):
            return bytes(module.decompress(data))
    if data.startswith(b"PK\x03\x04"):
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            members = [m for m in archive.namelist() if not m.endswith("/")]
            if len(members) != 1:
                raise UserError(f"{path.name} is an archive of {len(members)} files; unpack it into a directory")
            return archive.read(members[0])
    return data


def _decode(data: bytes, name: str) -> tuple[str, list[str]]:
    """Text with the line ends of Unix, and a notice if the encoding had to be guessed."""
    notices = []
    encoding = next((encoding for bom, encoding in BOMS if data.startswith(bom)), "")
    if not encoding and 4 * data[:1000].count(b"\0") > len(data[:1000]):
        encoding = "utf-16-be" if data[:1] == b"\0" else "utf-16-le"
    try:
        text = data.decode(encoding or "utf-8")
    except UnicodeDecodeError:
        if encoding:
            raise
        try:
            text, encoding = data.decode("cp1252"), "cp1252"
        except UnicodeDecodeError:
            text, encoding = data.decode("latin-1"), "latin-1"
        notices = [f"{name} is not UTF-8 and is read as {encoding}; if names look wrong, save it as UTF-8"]
    return text.replace("\r\n", "\n").replace("\r", "\n"), notices


def _sample(text: str) -> list[str]:
    """The first lines that are not blank."""
    lines = (line for line in io.StringIO(text) if line.strip())
    return [line.rstrip("\n") for line, _ in zip(lines, range(SAMPLE_LINES), strict=False)]


def _fields(lines: list[str], separator: str) -> list[list[str]]:
    """The fields of each line; an empty separator stands for white space."""
    lines = lines if separator else [line.strip() for line in lines]
    return list(csv.reader(lines, delimiter=separator or " ", skipinitialspace=True))


def _separator(lines: list[str]) -> str:
    """The separator with the same number of fields in every line; empty for white space.

    A decimal comma separates a similar number of fields, so the comma must separate many more than another separator.

    >>> _separator(["1,5;2,5;3,5", "1,5;2,5;3,5"]), _separator(["a,b,c", "1,2,x;y"]), _separator(["a b", "1  2"])
    (';', ',', '')
    """
    sizes = {separator: [len(row) for row in _fields(lines, separator)] for separator in (*SEPARATORS, "")}
    several = {s: n for s, n in sizes.items() if n[0] > 1}
    # Rows may have one more field than the header.
    regular = {s: n for s, n in several.items() if all(size in (n[0], n[0] + 1) for size in n)}
    found = {s: n[0] / (3 if s == "," else 1) for s, n in (regular or several).items()}
    if len(found) > 1:  # texts contain spaces
        found.pop("", None)
    return max(found, key=found.__getitem__, default=",")


def _is_header(rows: list[list[str]]) -> bool:
    """Whether the first row names the columns: no field is a number, or they are numbered.

    >>> _is_header([["x0", "y"]]), _is_header([["0", "1", "user"], ["3", "1", "ana"]]), _is_header([["3", "1", "ana"]])
    (True, True, False)
    """
    numeric = [field for field in rows[0] if _is_number(field)]
    if not numeric:
        return True
    # A text of the first row that occurs again below it is a value, not a name.
    columns = zip(*rows, strict=False)
    repeated = any(first in below for first, *below in columns if not _is_number(first))
    numbered = [[str(i + first) for i in range(len(numeric))] for first in (0, 1)]
    return len(numeric) > 1 and numeric in numbered and not repeated


def _complete_header(text: str, rows: list[list[str]], separator: str, name: str) -> str:
    """Complete a header with one field less than the rows.

    The rows end with a separator, or begin with row names, as R writes them. pandas takes both for row names.
    """
    more = {len(row) - len(rows[0]) for row in rows[1:]}
    if not more or max(more) <= 0:
        return text
    if more != {1}:
        raise UserError(f"{name}: some rows have {max(more)} more fields than the header; name every column")
    if any(row[-1] for row in rows[1:]):
        return f"row{separator or ' '}{text}"
    header, _, body = text.partition("\n")
    return f"{header}{separator}\n{body}"


def _is_number(field: str) -> bool:
    try:
        return float(field.strip().replace(",", ".")) is not None
    except ValueError:
        return False


def _refuse_duplicates(names: list[str], name: str) -> None:
    if twice := next((n for n in names if names.count(n) > 1), None):
        raise UserError(f"{name}: column {twice!r} occurs twice; rename one")


def _marks(frame: pd.DataFrame, separator: str) -> dict[str, str]:
    """Marks of decimals and thousands that turn text columns into numbers; empty if none is needed."""
    texts = [frame[c].dropna() for c in frame.columns if not pd.api.types.is_numeric_dtype(frame[c])]
    columns = [c.astype(str) for c in texts if len(c)]
    marked = [c for c in columns if c.str.fullmatch(r"[-+]?[\d.,]*\d(?:[eE][-+]?\d+)?").all()]
    marked = [c for c in marked if c.str.contains(",").any()]
    if not marked:
        return {}
    # 1,234 has three decimals where another character separates the columns, and is a thousand where a comma does.
    grouped = all(c.str.fullmatch(GROUPED).all() for c in marked)
    if any(c.str.fullmatch(THOUSANDS_COMMA).any() for c in marked) or (grouped and separator == ","):
        return {"thousands": ","}
    point = any(c.str.fullmatch(THOUSANDS_POINT).any() for c in marked)
    return {"decimal": ",", **({"thousands": "."} if point else {})}

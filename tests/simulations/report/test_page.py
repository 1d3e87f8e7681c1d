"""Tests of the HTML report, its files and the terminal tables on synthetic results with known means."""

import io
import json
import re
import shlex
from html.parser import HTMLParser

import pandas as pd
import pytest
from rich.console import Console

from fedbn.data.packages import SOURCES
from fedbn.errors import UserError
from fedbn.scenarios.base import scenarios
from fedbn_simulations.report import html_tables, plots, terminal
from fedbn_simulations.report import page as report_page
from fedbn_simulations.report.page import write_report
from fedbn_simulations.results import inference, summary
from fedbn_simulations.results.comparison import Comparison
from fedbn_simulations.results.files import write_run, write_shift
from fedbn_simulations.results.formatting import format_estimate
from fedbn_simulations.results.matrix import COLUMNS, ROWS
from tests.helpers import nonempty
from tests.simulations.results.test_comparison import edit_runs, keep_evaluations, write

HOSTILE = '<script>alert("x")</script>&$^{_{'
FULL = inference.RESAMPLES
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("error"), pytest.mark.xdist_group("report")]


class Page(HTMLParser):
    """Collects tags with attributes, tables as text, and ids."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.ids, self.tables = [], [], []
        self._cell = None
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append((tag, attributes))
        self.ids += [attributes["id"]] if "id" in attributes else []
        if tag == "table":
            self.tables.append([])
        elif tag in ("tr", "caption"):
            self.tables[-1].append([])
        if tag in ("td", "th", "caption"):
            self._cell = ""

    def handle_endtag(self, tag):
        if tag in ("td", "th", "caption"):
            self.tables[-1][-1].append(self._cell)
            self._cell = None

    def handle_data(self, data):
        if self._cell is not None:
            self._cell += data

    def table(self, caption):
        (table,) = [t for t in self.tables if t[0][0].startswith(caption)]
        return pd.DataFrame(table[2:], columns=table[1])


def page_of(directory):
    return Page(write_report(Comparison.load(directory)).read_text(encoding="utf-8"))


def terminal_text(directory, width):
    console = Console(width=width, file=io.StringIO())
    terminal.show(Comparison.load(directory), console)
    return console.file.getvalue()


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    """Use fewer resamples, except for the module's directory."""
    monkeypatch.setattr(inference, "RESAMPLES", 100)


@pytest.fixture
def without_figures(monkeypatch):
    monkeypatch.setattr(report_page, "picture", lambda *arguments, **options: None)
    monkeypatch.setattr(report_page, "paired_pictures", lambda comparison, **options: [])


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    directory = write(tmp_path_factory.mktemp("report"), domains=3)
    users = [f"user {i:02d}" for i in range(12)]
    distance = [[abs(i - j) / 10 for i in range(12)] for j in range(12)]
    layers = [{"layer": "norm1", "users": users, "distance": distance}]
    write_shift(directory, {"label_divergence": 0.25, "feature_w2": None, "new": 3.0, "layers": layers})
    write_report(Comparison.load(directory), print_formats=True)
    return directory


@pytest.fixture(scope="module")
def text(directory):
    return (directory / "report.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(text):
    return Page(text)


def test_page_is_self_contained(text, page):
    for tag, attributes in page.tags:
        assert tag not in ("link", "iframe", "object", "embed", "base")
        for name in ("src", "href", "xlink:href"):
            target = attributes.get(name) or "#"
            assert target.startswith(("#", "data:")) or tag == "a", (tag, target)
    assert not re.search(r"@import|url\((?![\"']?#)", text)
    assert "default-src 'none'" in text


def test_page_starts_with_answer_plot_and_table(text, page):
    first, _, rest = text.partition('<section id="matrix">')
    assert "paired-own-aggregated" in first
    brief = page.table("Accuracy, mean over users (higher is better)")
    assert list(brief.columns) == ["strategy", "own test", "worst 10 %", "unseen users", "unseen users, recalibrated"]
    assert "FedAvg" not in brief["strategy"][0]  # the strategies of this comparison have no readable names
    assert "https://arxiv.org/abs/2102.07623" in rest
    targets = [a["href"][1:] for tag, a in page.tags if tag == "a" and a["href"].startswith("#")]
    assert len(targets) >= 7
    assert set(targets) <= set(page.ids)


def test_brief_table_keeps_reference_and_best(tmp_path):
    names = {"global": 0.5} | {f"s{i}": 0.3 + 0.04 * i for i in range(10)}
    write(tmp_path, names, seeds=(0,), columns=("aggregated",))
    assert [row[0].text for row in html_tables.brief(Comparison.load(tmp_path)).rows] == [
        "global", *(f"s{i}" for i in range(9, 2, -1))
    ]  # fmt: skip


def test_page_is_accessible(page):
    assert all(t[0] for t in page.tables)
    assert len(page.ids) == len(set(page.ids))
    drawings = [attributes for tag, attributes in page.tags if tag == "svg"]
    assert drawings
    assert all(a["role"] == "img" and a["aria-label"] for a in drawings)
    assert dict(page.tags)["html"] == {"lang": "en"}


def test_page_matrix_equals_frame(directory, page, monkeypatch):
    monkeypatch.setattr(inference, "RESAMPLES", FULL)
    table = page.table("Accuracy: mean over users").set_index(["strategy", "statistics"])
    comparison = Comparison.load(directory)
    for line in comparison.matrix().itertuples():
        key = comparison.names[line.strategy], COLUMNS[line.column][0]
        if key in table.index:
            value = format_estimate(line.mean, line.ci_low, line.ci_high).replace(" [", "[")
            assert table.loc[key, ROWS[line.row][0]] == value
        else:
            assert pd.isna(line.mean)


def test_page_is_complete(directory, text, page, monkeypatch):
    monkeypatch.setattr(inference, "RESAMPLES", FULL)
    comparison = Comparison.load(directory)
    for sentence in summary.sentences(comparison):
        assert sentence in text
    for caption in ("Accuracy minus", "Accuracy by domain", "Owner of each role", "Settings", "Versions", "SHA-256"):
        assert len(page.table(caption))
    newcomers = page.table("Initial model of unseen").set_index("strategy")
    assert newcomers.loc["FedBN", "unseen users start from"] == "the mean of the seen users' statistics"
    assert comparison.meta["skew"] in text
    assert comparison.meta["command"] in text
    skew = page.table("Differences between seen users").set_index("skew in")["value"]
    assert skew.to_dict() == {"labels": ".250", "inputs": "–", "new": "3.000"}
    assert page.table("Distance between two users").iloc[0].tolist() == ["norm1", ".433", ".100", "1.100"]
    names = "matrix", "convergence", "shift", "paired-own-aggregated", "paired-unseen-aggregated"
    expected = {f"{name}{suffix}" for name in names for suffix in (".png", ".svg", ".pdf")}
    assert {p.name for p in (directory / "figures").iterdir()} == expected


def test_exported_csv_equals_frames(directory, monkeypatch):
    monkeypatch.setattr(inference, "RESAMPLES", FULL)
    comparison = Comparison.load(directory)
    for name, frame in (("matrix", comparison.matrix()), ("paired", comparison.paired())):
        exported = pd.read_csv(directory / f"{name}.csv")
        counts = {name: "Int64" for name in ("better", "worse") if name in frame}
        pd.testing.assert_frame_equal(exported.astype(counts), frame)


def test_write_report_is_deterministic(directory, text, monkeypatch):
    monkeypatch.setattr(inference, "RESAMPLES", FULL)
    assert write_report(Comparison.load(directory)).read_text(encoding="utf-8") == text


def test_page_escapes_hostile_names(tmp_path):
    meta = dict.fromkeys(("title", "command", "skew"), HOSTILE) | {"notices": [HOSTILE]}
    meta |= {"settings": {HOSTILE: HOSTILE}, "sources": {HOSTILE: HOSTILE}}
    write(tmp_path, {HOSTILE: 0.8, f"_{HOSTILE}": 0.7}, seeds=(0,), name=lambda i: f"{HOSTILE}{i}", **meta)
    layers = [{"layer": HOSTILE, "users": [HOSTILE, "b"], "distance": [[0.0, 1.0], [1.0, 0.0]]}]
    write_shift(tmp_path, {HOSTILE: HOSTILE, "layers": layers})
    page = page_of(tmp_path)
    assert len([tag for tag, _ in page.tags if tag == "script"]) == 1
    assert HOSTILE.replace("_", " ") in set(page.table("Settings")["setting"])
    assert HOSTILE in terminal_text(tmp_path, 400)


def test_page_shows_missing_cells_as_dashes(tmp_path, without_figures):
    keep_evaluations(write(tmp_path, seeds=(0,)), lambda _, e: e["row"] != "unseen", "1-*")
    page = page_of(tmp_path)
    for caption in ("Accuracy: mean", "Accuracy minus"):
        table = page.table(caption).set_index(["strategy", "statistics"])
        assert table.loc[("FedBN", "as aggregated"), "unseen users"] == "–"
        assert ("GroupNorm", "adapted online") not in table.index


@pytest.mark.parametrize(("users", "seeds"), [(1, (0, 1)), (6, (0,)), (1, (0,))])
def test_page_with_one_user_or_one_seed(tmp_path, users, seeds):
    write(tmp_path, users=users, unseen=0, seeds=seeds, columns=("aggregated",))
    page = page_of(tmp_path)
    assert "unseen users" not in page.table("Accuracy: mean").columns
    assert "nan" not in terminal_text(tmp_path, 100)


def test_page_counts_unfinished_runs(tmp_path, without_figures):
    write(tmp_path, unfinished=[("fedbn", 0), ("groupnorm", 2)], columns=("aggregated",))
    text = write_report(Comparison.load(tmp_path)).read_text(encoding="utf-8")
    assert "2 of 9 runs are not finished and left out." in text
    assert "2 of 9 runs" in terminal_text(tmp_path, 100)
    with pytest.raises(UserError, match="no finished run"):
        Comparison.load(write(tmp_path / "none", {"global": 0.8}, seeds=(0,), unfinished=[("global", 0)]))


def test_page_with_identical_strategies(tmp_path):
    write(tmp_path, {"global": 0.8, "twin": 0.8})
    for path in nonempty((tmp_path / "runs").glob("0-*/result.json")):
        twin = json.loads(path.read_text()) | {"strategy": "twin"}
        write_run(tmp_path, path.parent.name.replace("0-", "1-", 1), twin)
    paired = page_of(tmp_path).table("Accuracy minus").set_index("statistics")
    assert set(paired["worst 10 %"]) == {".000[.000, .000]"}
    assert set(paired["own test"]) == {".000[.000, .000]p = 1.000, 0↑ 0↓"}
    assert terminal.answer(Comparison.load(tmp_path)).count("do not differ") == 3


def test_convergence_figure_needs_two_rounds(tmp_path):
    edit_runs(write(tmp_path, {"global": 0.8}, seeds=(0,)), lambda result: result | {"curve": result["curve"][1:2]})
    assert plots.convergence_figure(Comparison.load(tmp_path)) is None


def test_paired_differences_of_many_strategies_are_lines(tmp_path):
    many = {"global": 0.8, **{f"strategy {i}": 0.7 for i in range(plots.MAX_PANELS + 1)}}
    comparison = Comparison.load(write(tmp_path, many))
    (axes,) = plots.paired_figure(comparison, "own", "aggregated").axes
    assert len(axes.get_yticks()) == plots.MAX_PANELS + 1
    few = Comparison.load(write(tmp_path / "few", dict(list(many.items())[:-1])))
    assert sum(a.get_visible() for a in plots.paired_figure(few, "own", "aggregated").axes) == plots.MAX_PANELS


def test_page_quotes_command_for_shell(tmp_path, without_figures):
    directory = write(tmp_path / "it's; rm -rf", {"global": 0.8}, seeds=(0,), command="")
    page = write_report(Comparison.load(directory)).read_text(encoding="utf-8")
    assert "Differences to" not in page, "no differences with a single strategy"
    (command,) = re.findall(r"<code>(fedbn report .*)</code>", page)
    command = command.replace("&#39;", "'").replace("&#34;", '"')
    assert shlex.split(command) == ["fedbn", "report", str(directory)]


def test_page_cites_data(tmp_path, text, without_figures):
    assert "No citation is on record" in text
    source = SOURCES["hapt"]
    write(tmp_path, {"global": 0.8}, seeds=(0,), sources={source.label: source.sha256})
    cited = write_report(Comparison.load(tmp_path)).read_text(encoding="utf-8")
    assert source.citation in cited
    assert source.license in cited
    write(tmp_path / "own", {"global": 0.8}, seeds=(0,), scenario="digits8:users=4")
    assert scenarios()["digits8"].citation in write_report(Comparison.load(tmp_path / "own")).read_text(
        encoding="utf-8"
    )


def test_answer_excludes_bounds(tmp_path):
    write(tmp_path, {"global": 0.7, "centralized": 0.9, "fedbn": 0.8})
    assert "FedBN" in terminal.answer(Comparison.load(tmp_path))
    assert "centralized training" not in terminal.answer(Comparison.load(tmp_path))


def test_answer_shows_corrected_p_if_not_significant(tmp_path):
    # With six users, p is .031 at least, and .062 after the correction for two strategies.
    write(
        tmp_path,
        {"global": 0.7, "fedbn": 0.8, "silobn": 0.7},
        users=6,
        unseen=0,
        user_std=0.001,
        columns=("aggregated",),
    )
    assert re.search(r"no clear difference .* \[\+.*, corrected p = \.", terminal.answer(Comparison.load(tmp_path)))


@pytest.mark.parametrize("width", [80, 100, 140])
def test_terminal_does_not_crop_or_split_numbers(directory, width):
    lines = terminal_text(directory, width).splitlines()
    assert max(map(len, lines)) <= width
    body = "\n".join(lines[lines.index("") :])
    assert "…" not in body
    assert not re.search(r"\[[^\]\n]*\n", body.replace("[95 %\n", ""))
    if width >= 100:
        assert len(lines) <= 60

"""What a comparison's page, its files and its terminal tables say, on made-up results with known means."""

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
from simulations.report import plots
from simulations.report import terminal as tables
from simulations.report.page import write_report
from simulations.results import inference, summary
from simulations.results.comparison import Comparison
from simulations.results.files import write_run, write_shift
from simulations.results.formatting import format_estimate
from simulations.results.matrix import COLUMNS, ROWS
from tests.simulations.results.test_comparison import write

HOSTILE = '<script>alert("x")</script>&$^{_{'
FULL = inference.RESAMPLES
pytestmark = [pytest.mark.filterwarnings("error"), pytest.mark.xdist_group("report")]


class Page(HTMLParser):
    """Collects what the tests ask for: tags with attributes, tables as text, ids."""

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
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th", "caption"):
            self._cell = ""

    def handle_endtag(self, tag):
        if tag in ("td", "th"):
            self.tables[-1][-1].append(self._cell)
            self._cell = None
        elif tag == "caption":
            self.tables[-1].append([self._cell])
            self._cell = None

    def handle_data(self, data):
        if self._cell is not None:
            self._cell += data

    def table(self, caption):
        (found,) = [t for t in self.tables if t[0][0].startswith(caption)]
        return pd.DataFrame(found[2:], columns=found[1])


def page_of(directory):
    return Page(write_report(directory).read_text(encoding="utf-8"))


def shown(directory, width):
    console = Console(width=width, file=io.StringIO())
    tables.show(Comparison.load(directory), console)
    return console.file.getvalue()


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    """After the module's directory is written in full, pages only need to be right, not smooth."""
    monkeypatch.setattr(inference, "RESAMPLES", 100)
    for name in ("png", "pdf"):
        monkeypatch.setattr(plots, name, lambda figure: b"")


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    directory = write(tmp_path_factory.mktemp("report"), domains=3)
    users = [f"user {i:02d}" for i in range(12)]
    distance = [[abs(i - j) / 10 for i in range(12)] for j in range(12)]
    layers = [{"layer": "norm1", "users": users, "distance": distance}]
    write_shift(directory, {"label_divergence": 0.25, "feature_w2": None, "new": 3.0, "layers": layers})
    write_report(directory)
    return directory


@pytest.fixture(scope="module")
def text(directory):
    return (directory / "report.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(text):
    return Page(text)


def test_the_page_needs_no_network(text, page):
    for tag, attributes in page.tags:
        assert tag not in ("link", "iframe", "object", "embed", "base")
        for name in ("src", "href", "xlink:href"):
            target = attributes.get(name) or "#"
            assert target.startswith(("#", "data:")), (tag, target)
    assert not re.search(r"@import|url\((?![\"']?#)", text)
    assert "default-src 'none'" in text


def test_the_page_is_one_a_screen_reader_can_follow(page):
    assert all(t[0] for t in page.tables)
    assert len(page.ids) == len(set(page.ids))
    drawings = [attributes for tag, attributes in page.tags if tag == "svg"]
    assert drawings
    assert all(a["role"] == "img" and a["aria-label"] for a in drawings)
    assert dict(page.tags)["html"] == {"lang": "en"}


def test_the_matrix_says_what_the_frame_says(directory, page, monkeypatch):
    monkeypatch.setattr(inference, "RESAMPLES", FULL)
    found = page.table("Accuracy: mean over users").set_index(["strategy", "statistics"])
    for line in Comparison.load(directory).matrix().itertuples():
        key = line.strategy, COLUMNS[line.column][0]
        if key in found.index:
            value = format_estimate(line.mean, line.ci_low, line.ci_high).replace(" [", "[")
            assert found.loc[key, ROWS[line.row][0]] == value
        else:
            assert pd.isna(line.mean)


def test_everything_asked_for_is_on_the_page(directory, text, page, monkeypatch):
    monkeypatch.setattr(inference, "RESAMPLES", FULL)
    comparison = Comparison.load(directory)
    for sentence in summary.sentences(comparison):
        assert sentence in text
    for caption in ("Accuracy minus", "Accuracy by domain", "Owner of each role", "Settings", "Versions", "SHA-256"):
        assert len(page.table(caption))
    newcomers = page.table("What an unseen user").set_index("strategy")
    assert newcomers.loc["fedbn", "a newcomer starts from"] == "the mean of the seen users' statistics"
    assert comparison.meta["skew"] in text
    assert comparison.meta["command"] in text
    skew = page.table("How far seen users").set_index("skew of")["value"]
    assert skew.to_dict() == {"labels": ".250", "inputs": "–", "new": "3.000"}
    assert page.table("Distance between two users").iloc[0].tolist() == ["norm1", ".433", ".100", "1.100"]
    names = "matrix", "convergence", "shift", "paired-own-aggregated", "paired-unseen-aggregated"
    wanted = {f"{name}{suffix}" for name in names for suffix in (".png", ".svg", ".pdf")}
    assert {p.name for p in (directory / "figures").iterdir()} == wanted


def test_exported_csv_equals_the_frames(directory, monkeypatch):
    monkeypatch.setattr(inference, "RESAMPLES", FULL)
    comparison = Comparison.load(directory)
    for name, frame in (("matrix", comparison.matrix()), ("paired", comparison.paired())):
        found = pd.read_csv(directory / f"{name}.csv")
        counts = {name: "Int64" for name in ("better", "worse") if name in frame}
        pd.testing.assert_frame_equal(found.astype(counts), frame)


def test_writing_twice_gives_the_same_page(directory, text, monkeypatch):
    monkeypatch.setattr(inference, "RESAMPLES", FULL)
    assert write_report(directory).read_text(encoding="utf-8") == text


def test_hostile_names_are_shown_and_not_obeyed(tmp_path):
    write(
        tmp_path,
        {HOSTILE: 0.8, f"_{HOSTILE}": 0.7},
        seeds=(0,),
        name=lambda i: f"{HOSTILE}{i}",
        title=HOSTILE,
        notices=[HOSTILE],
        command=HOSTILE,
        skew=HOSTILE,
        settings={HOSTILE: HOSTILE},
        sources={HOSTILE: HOSTILE},
    )
    distance = [[0.0, 1.0], [1.0, 0.0]]
    layers = [{"layer": HOSTILE, "users": [HOSTILE, "b"], "distance": distance}]
    write_shift(tmp_path, {HOSTILE: HOSTILE, "layers": layers})
    page = page_of(tmp_path)
    assert len([tag for tag, _ in page.tags if tag == "script"]) == 1
    assert HOSTILE.replace("_", " ") in set(page.table("Settings")["setting"])
    assert HOSTILE in shown(tmp_path, 400)


def test_missing_cells_are_dashes(tmp_path):
    write(tmp_path, seeds=(0,))
    for path in (tmp_path / "runs").glob("1-*/result.json"):
        result = json.loads(path.read_text())
        result["evaluations"] = [e for e in result["evaluations"] if e["row"] != "unseen"]
        write_run(tmp_path, path.parent.name, result)
    page = page_of(tmp_path)
    for caption in ("Accuracy: mean", "Accuracy minus"):
        found = page.table(caption).set_index(["strategy", "statistics"])
        assert found.loc[("fedbn", "as aggregated"), "unseen users"] == "–"
        assert ("groupnorm", "adapted online") not in found.index


@pytest.mark.parametrize(("users", "seeds"), [(1, (0, 1)), (6, (0,)), (1, (0,))])
def test_one_user_or_one_seed(tmp_path, users, seeds):
    write(tmp_path, users=users, unseen=0, seeds=seeds, columns=("aggregated",))
    page = page_of(tmp_path)
    assert "unseen users" not in page.table("Accuracy: mean").columns
    assert "nan" not in shown(tmp_path, 100)


def test_unfinished_runs_are_counted(tmp_path):
    write(tmp_path, unfinished=[("fedbn", 0), ("groupnorm", 2)], columns=("aggregated",))
    text = write_report(tmp_path).read_text(encoding="utf-8")
    assert "2 of 9 runs are not finished and left out." in text
    assert "2 of 9 runs" in shown(tmp_path, 100)
    with pytest.raises(UserError, match="no finished run"):
        write_report(write(tmp_path / "none", {"global": 0.8}, seeds=(0,), unfinished=[("global", 0)]))


def test_identical_strategies_differ_by_exactly_nothing(tmp_path):
    write(tmp_path, {"global": 0.8, "twin": 0.8})
    for path in (tmp_path / "runs").glob("0-*/result.json"):
        twin = json.loads(path.read_text()) | {"strategy": "twin"}
        write_run(tmp_path, path.parent.name.replace("0-", "1-", 1), twin)
    paired = page_of(tmp_path).table("Accuracy minus").set_index("statistics")
    assert set(paired["worst 10 %"]) == {".000[.000, .000]"}
    assert set(paired["own test"]) == {".000[.000, .000]p = 1.000, 0↑ 0↓"}
    assert tables.answer(Comparison.load(tmp_path)).count("do not differ") == 3


def test_one_evaluated_round_is_no_curve(tmp_path):
    write(tmp_path, {"global": 0.8}, seeds=(0,))
    path = tmp_path / "runs" / "0-0" / "result.json"
    result = json.loads(path.read_text())
    write_run(tmp_path, "0-0", result | {"curve": result["curve"][1:2]})
    assert plots.convergence_figure(Comparison.load(tmp_path)) is None


def test_how_to_do_it_again_is_quoted_for_the_shell(tmp_path):
    directory = write(tmp_path / "it's; rm -rf", {"global": 0.8}, seeds=(0,), command="")
    page = write_report(directory).read_text(encoding="utf-8")
    assert "Differences to" not in page, "one strategy has nothing to be compared with"
    found = re.findall(r"<code>(fedbn report .*)</code>", page)
    (again,) = (command.replace("&#39;", "'").replace("&#34;", '"') for command in found)
    assert shlex.split(again) == ["fedbn", "report", str(directory)]


def test_data_are_credited_where_it_is_known_whom(tmp_path, text):
    assert "No citation is on record" in text
    source = SOURCES["hapt"]
    write(tmp_path, {"global": 0.8}, seeds=(0,), sources={source.label: source.sha256})
    cited = write_report(tmp_path).read_text(encoding="utf-8")
    assert source.citation in cited
    assert source.license in cited


def test_a_bound_is_not_recommended(tmp_path):
    write(tmp_path, {"global": 0.7, "centralized": 0.9, "fedbn": 0.8})
    assert "fedbn" in tables.answer(Comparison.load(tmp_path))
    assert "centralized" not in tables.answer(Comparison.load(tmp_path))


def test_an_unclear_difference_with_a_clear_interval_says_why(tmp_path):
    # Of four users none can reach p < .05, however alike they are.
    write(tmp_path, {"global": 0.7, "fedbn": 0.8}, users=4, unseen=0, spread=0.001, columns=("aggregated",))
    assert re.search(r"no clear difference .* \[\+.*, corrected p = \.", tables.answer(Comparison.load(tmp_path)))


@pytest.mark.parametrize("width", [80, 100, 140])
def test_the_terminal_crops_and_splits_no_number(directory, width):
    lines = shown(directory, width).splitlines()
    assert max(map(len, lines)) <= width
    body = "\n".join(lines[lines.index("") :])
    assert "…" not in body
    assert not re.search(r"\[[^\]\n]*\n", body.replace("[95 %\n", ""))
    if width >= 100:
        assert len(lines) <= 60

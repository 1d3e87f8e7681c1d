"""``fedbn report``: formats of the matrix, several comparisons side by side, and ``--quiet`` on every command."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from fedbn.errors import UserError
from fedbn_simulations.cli import app as cli
from fedbn_simulations.report import plots, style
from fedbn_simulations.report.page import FORMATS, write_report, write_side_by_side
from fedbn_simulations.results.comparison import Comparison
from fedbn_simulations.results.inference import mean_of_users
from fedbn_simulations.results.side_by_side import SideBySide
from tests.helpers import make_reports_quick, nonempty
from tests.simulations.results.test_comparison import write

HOSTILE = '<script>alert("x")</script>&$_{|'


pytestmark = [pytest.mark.usefixtures("quick_reports"), pytest.mark.xdist_group("reports")]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Two comparisons of the same people; the second is 5 points better, and lacks one strategy."""
    place = tmp_path_factory.mktemp("pair")
    first, second = place / "a" / "found", place / "b" / "found"
    write(first, {"global": 0.80, HOSTILE: 0.85, "groupnorm": 0.82})
    write(second, {"global": 0.85, HOSTILE: 0.90}, seeds=(0, 1), settings={"rounds": 30, "batch_size": 32})
    return first, second


@pytest.fixture(scope="module")
def written(pair, tmp_path_factory):
    """The first of them with its page."""
    place = shutil.copytree(pair[0], tmp_path_factory.mktemp("written") / "copy")
    with pytest.MonkeyPatch.context() as patch:
        make_reports_quick(patch)
        write_report(Comparison.load(place))
    return place


# ---------------------------------------------------------------- side by side


def test_side_by_side_shortens_names_uniquely(pair):
    assert list(SideBySide.load(pair).comparisons) == ["a/found", "b/found"]
    with pytest.raises(UserError, match="given twice"):
        SideBySide.load([pair[0], pair[0].parent / "found"])


def test_differences_use_common_users_and_seeds(pair):
    side = SideBySide.load(pair)
    first, second = side.comparisons.values()
    frame = side.differences().set_index(["strategy", "row", "column"])
    assert set(frame.index.get_level_values("strategy")) == {"global", HOSTILE}
    line = frame.loc[("global", "own", "aggregated")]
    ours, theirs = (c.values("global", "own", "aggregated")[[0, 1]].to_numpy() for c in (second, first))
    assert line["difference"] == pytest.approx(mean_of_users(ours - theirs))
    assert line["difference"] == pytest.approx(0.05)
    assert (line["n_users"], line["n_seeds"]) == (12, 2)
    assert np.isnan(line["ci_low"])  # made so that all users differ by the same, which says nothing of other users


def test_differences_require_same_scenario(tmp_path):
    write(tmp_path / "a")
    write(tmp_path / "b", scenario="hapt:unseen=3")
    write(tmp_path / "c", scenario="synthetic:more=1")
    assert SideBySide.load([tmp_path / "a", tmp_path / "b"]).differences().empty
    assert not SideBySide.load([tmp_path / "a", tmp_path / "c"]).differences().empty
    page = tmp_path / "page.html"
    write_side_by_side([tmp_path / "a", tmp_path / "b"], page)
    assert "so there are no differences to show" in page.read_text()


def test_settings_lists_only_differences(pair):
    table = SideBySide.load(pair).settings()
    assert table.loc["rounds"].tolist() == ["20", "30"]
    assert "batch size" not in table.index
    assert table.loc["seeds"].tolist() == ["3", "2"]


def test_long_table_holds_both_matrices(pair):
    long = SideBySide.load(pair).long()
    for name, place in zip(("a/found", "b/found"), pair, strict=True):
        mine = long[long["comparison"] == name].drop(columns="comparison").reset_index(drop=True)
        pd.testing.assert_frame_equal(mine, Comparison.load(place).matrix())


def test_write_side_by_side_writes_page(pair, tmp_path):
    page = tmp_path / "new" / "page.html"
    write_side_by_side(pair, page)
    text = page.read_text()
    assert "<script>alert" not in text
    assert not re.search(r'(?:src|href)="(?!data:)', text)
    assert text.count('class="sortable cards"') == 2
    for part in ("a/found", "b/found", "Settings that differ", "rounds", "statistics"):
        assert part in text
    shown = SideBySide.load(pair).differences_wide()
    assert shown.index.names == ["statistics", "strategy", "comparison"]
    assert list(shown.columns) == ["own test", "worst 10 %", "global test", "unseen users"]
    assert list(dict.fromkeys(shown.index.get_level_values(0))) == ["as aggregated", "recalibrated", "adapted online"]


# ---------------------------------------------------------------- formats


@pytest.mark.parametrize("several", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_report_writes_every_format(pair, run_cli, several):
    places = pair if several else pair[:1]
    found = SideBySide.load(pair) if several else Comparison.load(pair[0])
    for name, (suffix, made) in FORMATS.items():
        code, out, err = run_cli("report", *places, "--format", name)
        assert (code, out, err) == (0, made(found), "")
        assert run_cli("report", *places, "--format", name, "--out", f"new/table{suffix}")[0] == 0
    read = pd.read_csv("new/table.csv")
    pd.testing.assert_frame_equal(read, found.long(), check_dtype=False, check_exact=False)
    latex = Path("new/table.tex").read_text(encoding="utf-8")
    assert r"\toprule" in latex
    assert r"\$\_\{|" in latex  # a label is no formula
    lines = Path("new/table.md").read_text(encoding="utf-8").splitlines()
    assert r"\|" in lines[3 if not several else 4]
    bars = {len(re.findall(r"(?<!\\)\|", line)) for line in lines}
    assert len(bars) == 1  # every line has as many cells


@pytest.mark.slow
def test_page_embeds_its_tables(written, monkeypatch):
    place, page = written, (written / "report.html").read_text()
    for name, (suffix, made) in FORMATS.items():
        assert (place / f"matrix{suffix}").read_text() == made(Comparison.load(place)), name
        assert f'download="matrix{suffix}" href="data:text/plain;base64,' in page
    figures = {p.name for p in (place / "figures").iterdir()}
    assert figures
    assert all(name.endswith(".svg") for name in figures)
    assert "@software{fedbn," in page
    assert (place / "figures" / "matrix.svg").read_text().startswith("<svg")


def test_wide_table_cells_name_their_column(written):
    """On a phone rows become cards, so a cell must say what it is."""
    page = (written / "report.html").read_text()
    for table in nonempty(re.findall(r'<table class="[^"]*cards">.*?</table>', page, re.DOTALL)):
        head = re.findall(r"<th scope=\"col\"[^>]*>(.*?)</th>", table)
        assert len(head) > 4
        for row in nonempty(re.findall(r"<tr>(.*?)</tr>", table.partition("<tbody>")[2], re.DOTALL)):
            assert re.findall(r'data-label="(.*?)"', row) == head


@pytest.mark.slow
def test_pdf_is_reproducible_and_searchable(pair, monkeypatch):
    monkeypatch.undo()
    first, second = (style.pdf(plots.matrix_figure(Comparison.load(pair[0]))) for _ in range(2))
    assert first == second
    assert first.startswith(b"%PDF")
    assert b"/Type3" not in first


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{a}", "{b}", "--into", "x.md"], "--into takes one directory"),
        (["{a}", "--full"], "--full goes with --into"),
        (["{a}", "--brief"], "--brief goes with --into"),
        (["{a}", "--brief", "--full", "--into", "d.md"], "give --full or --brief, not both"),
        (["{a}", "--format", "csv", "--json"], "not both"),
        (["{a}", "--out", "x.html"], "--out goes with --format"),
        (["{a}", "nowhere"], "nowhere is not a comparison"),
        (["{a}", "{a}"], "given twice"),
        (["{a}", "--format", "pdf"], "Invalid value for '--format'"),
    ],
)
def test_report_rejects_bad_options(pair, run_cli, arguments, message):
    code, out, err = run_cli("report", *(part.format(a=pair[0], b=pair[1]) for part in arguments))
    assert (code, out) == (2, "")
    assert message in re.sub(r"[│\s]+", " ", err)


@pytest.mark.slow
def test_report_prints_several_comparisons(pair, run_cli):
    code, out, _ = run_cli("report", *pair, "--out", "both.html", "--json")
    found = json.loads(out)
    assert code == 0
    assert list(found["answers"]) == ["a/found", "b/found"]
    assert {line["comparison"] for line in found["matrix"]} == set(found["answers"])
    assert found["differences"]
    code, out, _ = run_cli("report", *pair)
    assert code == 0
    assert "side-by-side.html" in out
    assert "Settings that differ" in out


# ---------------------------------------------------------------- quiet


def test_every_command_has_quiet_option(run_cli):
    names = [c.name or c.callback.__name__ for c in cli.app.registered_commands]
    assert len(names) > 8
    for name in names:
        code, out, _ = run_cli(name, "--help")
        assert code == 0
        assert "--quiet" in out, name


@pytest.mark.parametrize("flag", ["--quiet", "-q"])
def test_quiet_keeps_errors_files_and_json(pair, run_cli, tmp_path, flag):
    assert run_cli("report", pair[0], flag, "--format", "csv", "--out", "x.csv") == (0, "", "")
    assert Path("x.csv").exists()
    assert run_cli("list", "models", flag) == (0, "", "")
    code, out, err = run_cli("list", "models", flag, "--json")
    assert (code, err) == (0, "")
    assert json.loads(out)
    code, out, err = run_cli("report", tmp_path / "nowhere", flag)
    assert (code, out) == (2, "")
    assert "is not a comparison" in err
    code, out, err = run_cli("list", "rules", flag, "--nonsense")
    assert (code, out) == (2, "")
    assert "--nonsense" in err


def test_quiet_command_reports_interruption(pair, run_cli, monkeypatch):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("fedbn_simulations.report.page.write_report", interrupted)
    code, out, err = run_cli("report", pair[0], "-q")
    assert (code, out) == (130, "")
    assert err == "interrupted; finished results are stored"


def test_shell_completion_is_available(run_cli):
    code, out, _ = run_cli("--help")
    assert code == 0
    assert "--install-completion" in out
    assert "--show-completion" in out


def test_side_by_side_table_shows_numbers(pair):
    """A cell is the mean of its own comparison."""
    shown = SideBySide.load(pair).wide().reset_index().set_index(["statistics", "strategy", "comparison"])
    for name, place in zip(("a/found", "b/found"), pair, strict=True):
        values = Comparison.load(place).values("global", "unseen", "online").to_numpy()
        mean = f"{np.nanmean(values, axis=1).mean():.3f}".lstrip("0")
        assert shown.loc[("adapted online", "global", name), "unseen users"].startswith(mean)
    assert SideBySide.load(pair).to_markdown().startswith("| statistics | strategy | comparison |")

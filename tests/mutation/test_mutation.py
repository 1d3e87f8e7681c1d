from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from tests.helpers import PYTHONPATH, ROOT
from tests.mutation.__main__ import accepted, packages, report
from tests.mutation.sampling import draw
from tests.mutation.selection import likely_tests

CODE = """
from __future__ import annotations


def clip(x: int | None, limit: float = 2.5) -> int | None:
    if x is None:
        return None
    return x * 2 if x < limit else -1


class Counter:
    n: int | None = None

    def add(self, more=True):
        self.n = (self.n or 0) + 1
"""

MODULES = ("fedbn/statistics/moments.py", "fedbn/streams/switch.py")


@pytest.fixture
def sample(tmp_path):
    def drawn(code=CODE, count=99, seed=0):
        (tmp_path / "module.py").write_text(code, encoding="utf-8")
        return draw(tmp_path, ["module.py"], count, seed)

    return drawn


def changes(mutants):
    return {(m.before, m.after) for m in mutants}


def test_draw_mutates_each_place_once_and_no_annotation(sample):
    mutants = sample()
    assert len({m.key for m in mutants}) == len(mutants) == 14
    assert {m.before for m in mutants} == {
        "def clip(x: int | None, limit: float = 2.5) -> int | None:",
        "if x is None:",
        "return x * 2 if x < limit else -1",
        "def add(self, more=True):",
        "self.n = (self.n or 0) + 1",
    }
    assert ("if x is None:", "if x is not None:") in changes(mutants)
    assert ("return x * 2 if x < limit else -1", "return x / 2 if x < limit else -1") in changes(mutants)
    assert not any("int &" in m.after for m in mutants)
    for mutant in mutants:
        assert [line for line in mutant.source(CODE).splitlines() if line not in CODE.splitlines()]
        assert CODE.splitlines()[mutant.line - 1].strip() == mutant.before


def test_draw_depends_on_seed_and_is_nested(sample):
    few, more = sample(count=4), sample(count=8)
    assert more[:4] == few
    assert changes(sample(count=4, seed=1)) != changes(few)


def test_draw_is_stable_if_other_lines_change(sample):
    before = sample(count=5)
    after = sample(CODE.replace("\n\ndef clip", "\n\nimport os\n\nEMPTY = ()\n\n\ndef clip"), count=5)
    assert [m.key for m in after] == [m.key for m in before]
    assert changes(after) == changes(before)
    assert [a.line - b.line for a, b in zip(after, before, strict=True)] == [5] * 5


@pytest.mark.slow
def test_likely_tests_are_doctests_mirrored_and_importing_tests():
    tests = likely_tests("fedbn/statistics/moments.py", ROOT)
    assert tests[0] == "fedbn/statistics/moments.py"
    assert tests[1].startswith("tests/fedbn/statistics/")
    assert "tests/fedbn/statistics/test_moments.py" in tests
    assert "tests/fedbn/online/test_state.py" in tests
    assert "tests/fedbn/strategies/test_federated_norms.py" in likely_tests("fedbn/strategies/fednorm.py", ROOT)
    assert all(
        len(likely_tests(module, ROOT)) > 1
        for name, modules in packages().items()
        if name != "simulations"
        for module in modules[1:2]
    )


def test_report_does_not_count_equivalent_mutants(sample):
    mutants = sample(count=4)
    outcomes = {m.key: {"outcome": o} for m, o in zip(mutants, ("killed", "timeout", "survived", "survived"))}
    entry = {"module": "module.py", "before": mutants[3].before, "after": mutants[3].after, "reason": "because"}
    known = {("module.py", mutants[3].before, mutants[3].after): entry | {"equivalent": True}}
    lines = report({"part": mutants}, outcomes, known).splitlines()
    assert lines[1].split() == ["part", "4", "2", "1", "1", "67%"]
    assert lines[2].split()[1:] == lines[1].split()[1:]
    assert "module.py:" in lines[3]
    assert lines[-1].strip() == "because"
    assert report({"part": mutants}, {}, {}).splitlines()[1].split() == ["all", "0", "0", "0", "0", "-"]


def test_accepted_mutants_exist():
    for (module, before, _), entry in accepted().items():
        code = (ROOT / module).read_text(encoding="utf-8")
        assert before in [line.strip() for line in code.splitlines()], (
            f"{module} has changed: remove or edit {before!r}"
        )
        assert entry["reason"]


@pytest.mark.slow
def test_sampled_mutants_are_killed(tmp_path):
    """A small fixed sample; `make mutants` draws from all packages."""
    session = tmp_path / "mutants.jsonl"
    command = [sys.executable, "-m", "tests.mutation", *MODULES, "--count", "1", "--session", str(session)]
    environment = os.environ | {"PYTHONPATH": PYTHONPATH, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in session.read_text(encoding="utf-8").splitlines()]
    assert len(lines) == len(MODULES)
    known = accepted()
    lived = {(m["module"], m["before"], m["after"]) for m in lines if m["outcome"] not in ("killed", "timeout")}
    assert lived <= known.keys(), done.stdout
    again = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)
    assert again.stdout == done.stdout, "a finished session runs nothing"

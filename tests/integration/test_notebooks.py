"""Notebooks are stored with their outputs and plots, and give outputs of the same kinds when they run again."""

from __future__ import annotations

import runpy

import nbformat
import pytest

from tests.helpers import ROOT, nonempty

# By path, because some packages install a top-level package named examples.
SCRIPT = runpy.run_path(str(ROOT / "examples" / "execute.py"))
EACH = pytest.mark.parametrize("path", SCRIPT["NOTEBOOKS"], ids=lambda path: path.stem)


def outputs_of(notebook):
    """The kinds of outputs of each code cell."""
    cells = nonempty(cell for cell in notebook.cells if cell.cell_type == "code")
    return [[sorted(output.get("data", {"text": ""})) for output in cell.outputs] for cell in cells]


@EACH
def test_notebooks_are_stored_with_outputs_and_plots(path):
    notebook = nbformat.read(path, as_version=4)
    counts = [cell.execution_count for cell in notebook.cells if cell.cell_type == "code"]
    assert counts == list(range(1, len(counts) + 1)), "run: python examples/execute.py"
    assert any("image/png" in kinds for cell in outputs_of(notebook) for kinds in cell)
    for output in (o for cell in notebook.cells for o in cell.get("outputs", [])):
        assert output.output_type != "error"
        text = "".join(output.get("data", {}).get("text/plain", output.get("text", "")))
        assert not any(place in text for place in ("/tmp", "/home", "/root", "site-packages", "memory:"))


@pytest.mark.slow
@EACH
def test_notebooks_run(path):
    assert outputs_of(SCRIPT["executed"](path)) == outputs_of(nbformat.read(path, as_version=4))

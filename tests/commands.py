"""Commands that documents show, checked as far as that goes without running them."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import typer

from fedbn.strategies.base import strategies
from simulations.adaptation.study import study_from
from simulations.cli.app import app
from simulations.experiments.experiment import Experiment


def commands_in(document: Path) -> list[str]:
    """Lines that begin with ``fedbn``, without their comments."""
    return re.findall(r"^\s*(fedbn .*?)(?:\s+#.*)?$", document.read_text(encoding="utf-8"), re.MULTILINE)


def parses(line: str) -> None:
    """Fail unless the command exists, takes these options, and they name things that exist."""
    _, name, *arguments = shlex.split(line)
    command = typer.main.get_command(app).commands[name]
    if "--help" in arguments:
        return
    given = command.make_context(name, list(arguments)).params
    if name == "compare" and given["scenario"]:
        values = {"scenario": given["scenario"]}
        values |= {k: given[k] for k in ("partition", "shift") if given[k]}
        if given["strategies"]:
            chosen = given["strategies"]
            values["strategies"] = list(strategies()) if chosen == "all" else chosen.split(",")
        assert Experiment.from_dict(values).resolved()
    if name == "adapt":
        lists = {k: tuple(given[k].split(",")) for k in ("rules", "streams", "starts", "strategies")}
        values = {"scenario": given["scenario"], "seeds": 1, **lists}
        assert study_from(values).resolved()

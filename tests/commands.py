"""Commands that documents show, checked as far as that goes without running them."""

from __future__ import annotations

import re
import shlex
from dataclasses import fields
from functools import cache
from pathlib import Path

import typer
from click import Command

from fedbn.strategies.base import strategies
from fedbn_simulations.adaptation.study import Study
from fedbn_simulations.cli.app import app
from fedbn_simulations.cli.compare import candidates_from
from fedbn_simulations.cli.options import parts
from fedbn_simulations.experiments.experiment import Experiment

KINDS = {"compare": Experiment, "adapt": Study}


@cache
def command_line() -> Command:
    """The command ``fedbn``. Typer takes 50 ms to build it."""
    return typer.main.get_command(app)


def commands_in(document: Path) -> list[str]:
    """Lines that begin with ``fedbn``, without their comments."""
    return re.findall(r"^\s*(fedbn .*?)(?:\s+#.*)?$", document.read_text(encoding="utf-8"), re.MULTILINE)


def parses(line: str) -> None:
    """Fail unless the command exists, takes these options, and they name things that exist."""
    _, name, *arguments = shlex.split(line)
    command = command_line().commands[name]
    if "--help" in arguments:
        return
    given = command.make_context(name, list(arguments)).params
    if name in KINDS and given["scenario"]:
        kind = KINDS[name]
        values = {f.name: given[f.name] for f in fields(kind) if given.get(f.name) is not None and f.name != "tune"}
        if given.get("tune"):
            values["tune"] = candidates_from(given["tune"])
        values |= {k: parts(v) for k, v in values.items() if k in ("strategies", "rules", "streams", "starts")}
        if values.get("strategies") == ("all",):
            values["strategies"] = tuple(strategies())
        if ":" in values.get("model", ""):  # a module of the reader
            del values["model"]
        assert kind.from_dict(values).resolved()

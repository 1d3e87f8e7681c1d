"""``--tune`` on the command line."""

from __future__ import annotations

import pytest
import typer

from fedbn.errors import UserError
from fedbn_simulations.cli.app import app
from fedbn_simulations.cli.compare import candidates_from
from fedbn_simulations.cli.quiet import add_quiet_option


@pytest.mark.parametrize(
    "arguments",
    [
        ["hapt", "--tune", "lr=0.01,0.1", "optimizer=sgd,adamw", "--rounds", "3"],
        ["hapt", "--rounds", "3", "--tune", "lr=0.01,0.1 optimizer=sgd,adamw"],
        ["--tune", "lr=0.01,0.1", "--tune", "optimizer=sgd,adamw", "hapt", "--rounds", "3"],
        ["--tune", "lr=0.01,0.1", "optimizer=sgd,adamw", "hapt", "--rounds", "3"],
    ],
)
def test_tune_takes_several_options(arguments):
    given = typer.main.get_command(add_quiet_option(app)).commands["compare"].make_context("compare", arguments).params
    assert (given["scenario"], given["rounds"]) == ("hapt", 3)
    assert candidates_from(given["tune"]) == {"lr": ("0.01", "0.1"), "optimizer": ("sgd", "adamw")}


@pytest.mark.parametrize(
    ("texts", "message"),
    [(["0.1,0.2"], "takes OPTION=VALUE,VALUE"), (["lr=0.1", "--lr=0.2"], "has lr twice")],
)
def test_malformed_tune_is_refused(texts, message):
    with pytest.raises(UserError, match=message):
        candidates_from(texts)

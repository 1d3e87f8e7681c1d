"""`fedbn.Client` against a service on a socket."""

from __future__ import annotations

import re
import shlex

import numpy as np
import pytest

pytest.importorskip("fastapi")

from fedbn import Client, UserError
from tests.helpers import ROOT
from tests.simulations.service.test_load import CLASSES, SHAPE, TOKEN, serving

WINDOWS = np.zeros((2, *SHAPE))


def test_client_example_of_the_documentation_runs(capsys):
    [command] = re.findall(r"```bash\n(python -c .*?)```", (ROOT / "docs/service.md").read_text(), re.DOTALL)
    _, _, code = shlex.split(command)
    with serving() as port:
        exec(code.replace("127.0.0.1:8000", f"127.0.0.1:{port}"), {})
    names = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert len(names) == 2
    assert set(names) <= set(CLASSES)


def test_client_enrolls_predicts_and_deletes():
    with serving(token=TOKEN) as port:
        url = f"http://127.0.0.1:{port}/"
        client = Client(url, token=TOKEN)
        assert client.model()["shape"] == list(SHAPE)
        assert not client.enroll("ann")
        with pytest.raises(UserError, match="bob"):
            client.observe("bob", WINDOWS)
        adapting = Client(url, token=TOKEN, enroll=True)
        assert [a["name"] in CLASSES for a in adapting.observe("bob", WINDOWS)["answers"]] == [True, True]
        assert adapting.report("bob")["windows"] == 2
        client.calibrate("bob", np.zeros((3, *SHAPE)), CLASSES, then="freeze")
        client.reset("bob")
        client.delete("bob")
        with pytest.raises(UserError, match="bob"):
            client.predict("bob", WINDOWS)
        with pytest.raises(UserError, match="Bearer TOKEN"):
            Client(url).report("ann")
    with pytest.raises(UserError, match="does not answer.*start it with fedbn serve"):
        client.model()
    with pytest.raises(UserError, match="write http://HOST:PORT"):
        Client("127.0.0.1:8000")

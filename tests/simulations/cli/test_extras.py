"""Missing optional packages are reported before work starts, and no file is left."""

from __future__ import annotations

import sys

import pytest

SMALL = ("digits8:images=300:users=3:unseen=1", "--rounds", 1, "--seeds", 1)


@pytest.mark.parametrize(
    ("package", "extra", "command"),
    [
        ("ray", "ray", ("compare", *SMALL, "--engine", "ray")),
        ("opacus.accountants.analysis", "privacy", ("compare", *SMALL, "--privacy", "clip=1:noise=1")),
        ("torch.utils.tensorboard", "trackers", ("compare", *SMALL, "--track", "tensorboard:logs/deep")),
        ("mlflow", "trackers", ("claims", "fedbn-feature-skew", "--quick", "--track", "mlflow:logs")),
        ("river", "online", ("adapt", *SMALL, "--rules", "pseudo/adwin/reset")),
        ("river", "demo", ("serve", *SMALL[:3])),
        ("fastapi", "demo", ("demo",)),
    ],
)
def test_missing_package_is_reported_before_work_starts(package, extra, command, run_cli, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    out = () if command[0] in ("serve", "demo") else ("--out", "out")
    code, _, error = run_cli(*command, *out)
    assert code == 2
    assert f"pip install 'fedbn[{extra}]', or pip install -e '.[{extra}]' in a clone" in error
    assert list(tmp_path.iterdir()) == []


def test_tracker_of_a_refused_comparison_leaves_no_directory(run_cli, tmp_path):
    (tmp_path / "file").touch()
    code, _, error = run_cli("compare", *SMALL, "--out", "file/out", "--track", "tensorboard:logs")
    assert code == 2
    assert "choose another --out" in error
    assert [p.name for p in tmp_path.iterdir()] == ["file"]

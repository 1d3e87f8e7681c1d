"""CIFAR: CIFAR-10 and CIFAR-100 in the binary version.

Krizhevsky, *Learning Multiple Layers of Features from Tiny Images*, 2009,
https://www.cs.toronto.edu/~kriz/learning-features-2009-TR.pdf. The Python version of the archive contains pickles,
which can run any code when they are read, and is refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from fedbn.data.images import ImageSet, read_cifar
from fedbn.errors import UserError
from fedbn.scenarios.image_sets import ImageScenario


@dataclass(frozen=True)
class Cifar(ImageScenario):
    """32x32 color images of 10 or 100 classes, e.g. ``cifar:path=cifar-10-batches-bin``.

    The options are those of `ImageScenario`.
    """

    name: ClassVar[str] = "cifar"
    about: ClassVar[str] = "CIFAR-10 or CIFAR-100 from the binary version (path=)"
    model: ClassVar[str] = "resnet20"

    @property
    def data_name(self) -> str:
        return "cifar"

    def read(self) -> ImageSet:
        if not self.path or not Path(self.path).expanduser().is_dir():
            raise UserError(
                f"scenario 'cifar' reads the unpacked binary version, not {self.path or 'no path'!r}: download "
                "cifar-10-binary.tar.gz from https://www.cs.toronto.edu/~kriz/cifar.html, unpack it and set "
                "cifar:path=cifar-10-batches-bin"
            )
        return read_cifar(Path(self.path).expanduser())

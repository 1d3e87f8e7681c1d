"""Lists of layers, functions and methods of the stacked program as Markdown: ``python -m fedbn.stacked.supported``."""

from __future__ import annotations

from collections.abc import Iterable
from textwrap import fill

from torch.nn import functional as F

from fedbn.stacked.functions import FUNCTIONS, METHODS
from fedbn.stacked.layers import STACKED_LAYERS


def supported() -> dict[str, list[str]]:
    """Names of the supported layers, functions and tensor methods.

    >>> supported()["layers"][:2], supported()["methods"][0]
    (['AdaptiveAvgPool1d', 'AdaptiveAvgPool2d'], 'abs')
    """
    layers = {kind.__name__ for kind in STACKED_LAYERS if kind.__module__.startswith("torch.")}
    pooling = {id(f): name for name, f in vars(F).items() if "_pool" in name and not name.startswith("_")}
    functions = {pooling.get(id(f), f.__name__) for f in FUNCTIONS}
    return {
        "layers": sorted(layers),
        "functions": sorted(functions - {"getattr"}),
        "methods": sorted(METHODS),
    }


def markdown() -> str:
    """One list item per kind."""

    def item(kind: str, names: Iterable[str]) -> str:
        text = f"- {kind}: {', '.join(f'`{name}`' for name in names)}"
        return fill(text, 125, subsequent_indent="  ", break_on_hyphens=False)

    return "\n".join(item(kind, names) for kind, names in supported().items())


if __name__ == "__main__":
    print(markdown())

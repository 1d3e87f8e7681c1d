r"""Label-correlated chunks with Dirichlet class shares, as in NOTE.

There are as many chunks as classes. Each class is split over the chunks in shares
:math:`\sim Dir(\delta,\dots,\delta)`; full chunks get none. Within a chunk each class is contiguous. With small
:math:`\delta` a chunk has nearly one class; with large :math:`\delta` every chunk has all classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from fedbn.data.population import Examples
from fedbn.seeds import numpy_generator
from fedbn.streams.base import Stream, StreamSpec, reorder

ATTEMPTS = 100
"""Maximum number of draws; the last one is used even if its smallest chunk is too small."""


@dataclass(frozen=True)
class Dirichlet(StreamSpec):
    """Chunks of skewed classes, redrawn until each has at least ten windows or a quarter of its fair share.

    Attributes:
        delta: concentration.

    >>> own = Examples(torch.arange(40.0)[:, None], torch.arange(40) % 4, torch.zeros(40))
    >>> sorted(Dirichlet().make("ann", [own], seed=0).x.flatten().tolist()) == own.x.flatten().tolist()
    True
    """

    name = "dirichlet"
    about = "chunks with class shares from a Dirichlet distribution"
    source = "Gong et al. 2022 (NOTE), https://arxiv.org/abs/2208.05117"
    needs_classes = True
    bounds = (("delta", "above 0"),)
    delta: float = 0.1

    def make(self, user: str, recordings: Sequence[Examples], seed: int) -> Stream:
        draw = numpy_generator(seed, "stream", self.name, user)
        chunks = self.chunks(recordings[0].y.cpu().numpy(), draw)
        order = [chunk[i] for chunk in chunks for i in draw.permutation(len(chunk))]
        return reorder(user, recordings[0], torch.from_numpy(np.concatenate(order)))

    def chunks(self, y: np.ndarray, draw: np.random.Generator) -> list[list[np.ndarray]]:
        """Rows of each class in each chunk, from labels ``[n]``."""
        classes = np.unique(y)
        fair = len(y) / len(classes)
        enough = min(10.0, fair / 4)
        for _ in range(ATTEMPTS):
            chunks: list[list[np.ndarray]] = [[] for _ in classes]
            for label in draw.permutation(classes):
                filled = np.array([sum(map(len, chunk)) for chunk in chunks])
                weight = draw.dirichlet([self.delta] * len(chunks)) * (filled < fair)
                if weight.sum() == 0:  # all of the draw fell on full chunks
                    weight = (filled < fair).astype(float)
                for chunk, part in zip(chunks, split_by_weight(np.flatnonzero(y == label), weight), strict=True):
                    chunk.append(part)
            if min(sum(map(len, chunk)) for chunk in chunks) >= enough:
                break
        return chunks


def split_by_weight(rows: np.ndarray, weight: np.ndarray) -> list[np.ndarray]:
    """Split ``rows`` into consecutive parts proportional to ``weight``; some may be empty."""
    cuts = np.rint(np.cumsum(weight / weight.sum())[:-1] * len(rows)).astype(int)
    return np.split(rows, cuts)

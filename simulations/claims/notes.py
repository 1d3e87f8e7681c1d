"""What else was measured where a claim does not hold or stays undecided; beside the studies, whose results it outlives.

A study's file belongs to the identity of its results, and words that come after them must not change it.
"""

from __future__ import annotations

_SIZES = "batches of 1, 2, 4, 8 and 32 with BN, group and layer normalization and EvalNorm (figure)"
_DROPOUT = "dropout with and without BN beside either alone (figure)"
_READINGS = (
    "all ten weights and schedules of the paper's table in both readings (figure); in a pilot a third reading, with "
    "gradients through the batch's share of the average, which trained worse the smaller the weight"
)
_BNE = (
    "the mixture in evaluation only and in the last quarter of training too, and what adapts to the new domain "
    "(figure); in a pilot other made-up domains and the nearest branch alone"
)
_EVALNORM = (
    "both rules, batches of 2, 4 and 8, and a weight chosen on held-out data (figure); in a pilot also images of "
    "varying brightness and contrast"
)
_FN = "in a pilot other learning rates; momentum and larger steps made full normalization diverge"
_DABN = (
    "both orders, two data sets, and the mean of users' statistics without adaptation (figure); in a pilot weights of "
    "a window from 0.001 to 0.3; other rules on the same streams are what `fedbn adapt` measures"
)
_GRID = "six normalizers, two models, two batches and three skews in one grid (figure)"
_RESMLP = "all four networks on made embeddings and on four real tables (figure)"
_STROKE = "5 and 20 epochs, with and without BN, against four classical rules (figure)"

TRIED: dict[str, str] = {
    "bn-learning-rate-cnn": "every power of two from 1/64 to 256; an MLP beside the CNN",
    "bn-small-batch": _SIZES,
    "bn-one-row": _SIZES,
    "bn-small-batch-evalnorm": _SIZES,
    "bn-placement": "before the convolution, and nowhere (figure)",
    "bn-regularizes": _DROPOUT,
    "bn-instead-of-dropout": _DROPOUT,
    "binary-scale": "five kinds of normalization, an MLP and a CNN (figure)",
    "binary-scale-cnn": "five kinds of normalization, an MLP and a CNN (figure)",
    "binary-fixed": "five kinds of normalization, an MLP and a CNN (figure)",
    "dbn-quarter": _READINGS,
    "dbn-diminishing": _READINGS,
    "dbn-steady": _READINGS,
    "dbn-quarter-inference": _READINGS,
    "dbn-steady-inference": _READINGS,
    "dbn-never": _READINGS,
    "bne-weights": _BNE,
    "bne-pooled": _BNE,
    "bne-without-adaptation": _BNE,
    "bne-federated-weights": "every domain as the stranger, in turn over the seeds",
    "bne-federated-pooled": "every domain as the stranger, in turn over the seeds",
    "evalnorm-gap": _EVALNORM,
    "evalnorm-distance": _EVALNORM,
    "evalnorm-accuracy": _EVALNORM,
    "evalnorm-square": _EVALNORM,
    "evalnorm-own-batch": _EVALNORM,
    "weighing-accuracy": "weights 0, 0.05, 0.1, 0.2, 0.3 and 0.5; where held-out data choose 0 nothing can differ",
    "fedtan-beats-groupnorm": "rows dealt at random beside label-sorted ones (figure)",
    "fn-gradient-rate": "averaging rates from 0.01 to 1 (figure)",
    "fn-two-labels": _FN,
    "fn-all-labels": _FN,
    "groupnorm-label-skew": _GRID,
    "fedbn-feature-skew": _GRID,
    "fedbn-real-users": "all strategies on the same people: `fedbn compare hapt`",
    "silobn-global-label-skew": _GRID,
    "recalibrated-label-skew": _GRID,
    "grid-labels": _GRID,
    "grid-batch": _GRID,
    "grid-adaptive": _GRID,
    "grid-weightnorm": _GRID,
    "dabn-mixed-stream": _DABN,
    "dabn-natural-stream": _DABN,
    "dabn-order-matters": _DABN,
    "dabn-mixed-stream-watch": _DABN,
    "dabn-natural-stream-watch": _DABN,
    "dabn-order-matters-watch": _DABN,
    "pretrained-rate": "four rates for each network (figure)",
    "pretrained-freezing": "from scratch, as it is, and with statistics measured again (figure)",
    "pretrained-statistics": "training the classifier, or everything, on the same images with labels (figure)",
    "resmlp-ic-skip": _RESMLP,
    "resmlp-skip-on-top": _RESMLP,
    "resmlp-ic-on-top": _RESMLP,
    "resmlp-tables": _RESMLP,
    "resmlp-tables-ic": _RESMLP,
    "resmlp-hapt": _RESMLP,
    "stroke-cnn": _STROKE,
    "stroke-cnn-f-score": _STROKE,
    "stroke-bn": _STROKE,
}

"""Additional measurements for claims that do not hold or are undecided.

They are not part of the studies, because a study is fixed before its runs.
"""

from __future__ import annotations

_SIZES = "batches of 1, 2, 4, 8 and 32 with BN, group and layer normalization and EvalNorm (figure)"
_DROPOUT = "BN and dropout, together and separately (figure)"
_INTERPRETATIONS = (
    "all ten weights and schedules of the paper's table in both interpretations (figure); in a pilot a third "
    "interpretation, with gradients through the batch's part of the average, which trained worse for smaller weights"
)
_BNE = (
    "the mixture in evaluation only and also in the last quarter of training, and methods that adapt to the new "
    "domain (figure); in a pilot other synthetic domains and the nearest branch only"
)
_EVALNORM = (
    "both rules, batches of 2, 4 and 8, and a weight selected on held-out data (figure); in a pilot also images with "
    "varying brightness and contrast"
)
_FN = "in a pilot other learning rates; full normalization diverged with momentum and larger steps"
_DABN = (
    "both orders, two data sets, and the mean of users' statistics without adaptation (figure); in a pilot weights per "
    "window from 0.001 to 0.3; `fedbn adapt` measures other rules on the same streams"
)
_GRID = "six normalizers, two models, two batches and three skews in one grid (figure)"
_RESMLP = "all four networks on synthetic embeddings and on four real tables (figure)"
_STROKE = "5 and 20 epochs, with and without BN, against four classical methods (figure)"
_BINARY = "five kinds of normalization, an MLP and a CNN (figure)"
_EVERY_DOMAIN = "every domain as the unseen one, in turn over the seeds"

TRIED: dict[str, str] = {
    "bn-learning-rate-cnn": "every power of two from 1/64 to 256; an MLP in addition to the CNN",
    **dict.fromkeys(("bn-small-batch", "bn-one-row", "bn-small-batch-evalnorm"), _SIZES),
    "bn-placement": "BN before the convolution, and no BN (figure)",
    **dict.fromkeys(("bn-regularizes", "bn-instead-of-dropout"), _DROPOUT),
    **dict.fromkeys(("binary-scale", "binary-scale-cnn", "binary-fixed"), _BINARY),
    **dict.fromkeys(
        ("dbn-quarter", "dbn-diminishing", "dbn-steady", "dbn-quarter-inference", "dbn-steady-inference", "dbn-never"),
        _INTERPRETATIONS,
    ),
    **dict.fromkeys(("bne-weights", "bne-pooled", "bne-without-adaptation"), _BNE),
    **dict.fromkeys(("bne-federated-weights", "bne-federated-pooled"), _EVERY_DOMAIN),
    **dict.fromkeys(
        ("evalnorm-gap", "evalnorm-distance", "evalnorm-accuracy", "evalnorm-square", "evalnorm-own-batch"), _EVALNORM
    ),
    "weighing-accuracy": "weights 0, 0.05, 0.1, 0.2, 0.3 and 0.5; if held-out data select 0, there is no difference",
    "fedtan-beats-groupnorm": "randomly distributed data in addition to label-sorted shards (figure)",
    "fn-gradient-rate": "averaging rates from 0.01 to 1 (figure)",
    **dict.fromkeys(("fn-two-labels", "fn-all-labels"), _FN),
    **dict.fromkeys(("groupnorm-label-skew", "fedbn-feature-skew", "silobn-global-label-skew"), _GRID),
    "recalibrated-label-skew": _GRID,
    **dict.fromkeys(("grid-labels", "grid-batch", "grid-adaptive", "grid-weightnorm"), _GRID),
    "fedbn-real-users": "all strategies on the same people: `fedbn compare hapt`",
    **dict.fromkeys(("dabn-mixed-stream", "dabn-natural-stream", "dabn-order-matters"), _DABN),
    **dict.fromkeys(("dabn-mixed-stream-watch", "dabn-natural-stream-watch", "dabn-order-matters-watch"), _DABN),
    "pretrained-rate": "four rates for each network (figure)",
    "pretrained-freezing": "training from scratch, no training, and recalibrated statistics (figure)",
    "pretrained-statistics": "training the classifier or all layers on the same images with labels (figure)",
    **dict.fromkeys(("resmlp-ic-skip", "resmlp-skip-on-top", "resmlp-ic-on-top"), _RESMLP),
    **dict.fromkeys(("resmlp-tables", "resmlp-tables-ic", "resmlp-hapt"), _RESMLP),
    **dict.fromkeys(("stroke-cnn", "stroke-cnn-f-score", "stroke-bn"), _STROKE),
}

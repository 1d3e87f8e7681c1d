"""A 1-D CNN with BN detects stroke from EEG and EOG (Giri et al.).

A *synthetic* cohort of the same size replaces the patients (`fedbn.scenarios.stroke`), and the network is our design.
One subject is left out at a time, as in the paper (quick runs: five folds of subjects). The 1-D CNN and the classical
methods get the same 24 features. For your own recordings, use ``fedbn eeg TABLE``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch

from fedbn.data.population import Examples
from fedbn.models.stroke_cnn import StrokeEEG1DCNN
from fedbn.nn.conversion import convert
from fedbn.nn.inference import logits
from fedbn.scenarios.stroke import Cohort, cohort
from fedbn_simulations.claims.claim import Claim
from fedbn_simulations.claims.studies.common import by_epoch, seeded, shuffled, train

NUMERICS = 1


def folds(subjects: Cohort, k: int, seed: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Training and test rows of ``k`` folds of subjects."""
    order = torch.randperm(int(subjects.subject.max()) + 1, generator=torch.Generator().manual_seed(seed))
    tests = [torch.isin(subjects.subject, part) for part in order.tensor_split(k)]
    return [((~t).nonzero()[:, 0], t.nonzero()[:, 0]) for t in tests]


def _examples(subjects: Cohort, rows: torch.Tensor, train_rows: torch.Tensor) -> Examples:
    """Rows, standardized with the training rows."""
    x = (subjects.x - subjects.x[train_rows].mean(0)) / subjects.x[train_rows].std(0)
    return Examples(x[rows], subjects.y[rows], subjects.subject[rows])


def network(norm: str, epochs: Sequence[int], subjects: Cohort, k: int, seed: int) -> dict[int, tuple[float, float]]:
    """Accuracy and F-score over all folds after each of ``epochs`` in one training, with BN or ``none``.

    Adam 0.001, batches of 16.
    """
    predicted = {epoch: torch.zeros_like(subjects.y) for epoch in epochs}
    for fold, (train_rows, test_rows) in enumerate(folds(subjects, k, seed)):
        data, test = (_examples(subjects, rows, train_rows) for rows in (train_rows, test_rows))
        with seeded(seed, "weights", fold):
            model = StrokeEEG1DCNN(tuple(subjects.x.shape[1:]), 2)
            if norm == "none":
                convert(model, "none")
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        order = list(shuffled(len(data), 16, max(epochs), seed))
        with seeded(seed, "dropout", fold):
            for epoch, rows in enumerate(by_epoch(order, max(epochs)), 1):
                train(model, data, rows, optimizer)
                if epoch in predicted:
                    predicted[epoch][test_rows] = logits(model, test.x).argmax(1)
    return {epoch: scores(labels, subjects.y) for epoch, labels in predicted.items()}


def classical(subjects: Cohort, k: int, seed: int) -> dict[str, tuple[float, float]]:
    """Accuracy and F-score over all folds of k nearest neighbors, naive Bayes, logistic regression and SVM."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.naive_bayes import GaussianNB
    from sklearn.neighbors import KNeighborsClassifier
    from sklearn.svm import SVC

    classifiers = {
        "nearest neighbors": KNeighborsClassifier(),
        "naive Bayes": GaussianNB(),
        "logistic regression": LogisticRegression(max_iter=2000),
        "SVM": SVC(),
    }
    predicted = {name: torch.zeros_like(subjects.y) for name in classifiers}
    for train_rows, test_rows in folds(subjects, k, seed):
        data, test = (_examples(subjects, rows, train_rows) for rows in (train_rows, test_rows))
        for name, classifier in classifiers.items():
            classifier.fit(data.x.flatten(1).numpy(), data.y.numpy())
            predicted[name][test_rows] = torch.from_numpy(classifier.predict(test.x.flatten(1).numpy()))
    return {name: scores(labels, subjects.y) for name, labels in predicted.items()}


def scores(predicted: torch.Tensor, y: torch.Tensor) -> tuple[float, float]:
    """Accuracy, and F-score of class 1, of predicted labels ``[n]``.

    >>> scores(torch.tensor([1, 1, 0, 0]), torch.tensor([1, 0, 1, 0]))
    (0.5, 0.5)
    """
    hits = int(((predicted == 1) & (y == 1)).sum())
    return float((predicted == y).double().mean()), 2 * hits / max(int((predicted == 1).sum() + (y == 1).sum()), 1)


def left_out(arm: str, seed: int, quick: bool) -> dict[str, float]:
    """Accuracy and F-score on left-out subjects; the arm is ``bn``, ``none`` or ``classical``."""
    subjects = cohort(62, 4, seed)
    k = 5 if quick else 62
    if arm == "classical":
        results = classical(subjects, k, seed)
    else:
        epochs = (5, 20) if arm == "bn" else (5,)
        results = {f"{arm} {epoch}": pair for epoch, pair in network(arm, epochs, subjects, k, seed).items()}
    return {f"{measure}: {name}": pair[i] for i, measure in enumerate(MEASURES) for name, pair in results.items()}


MEASURES = ("accuracy", "F-score")
CLASSICAL = ("nearest neighbors", "naive Bayes", "logistic regression", "SVM")
NETWORKS = ("bn 5", "none 5", "bn 20")


def gain_over_classical(values: Mapping[str, float]) -> float:
    """Score of the network minus that of the best classical method, which is selected by its test score."""
    return values["bn 20"] - max(values[name] for name in CLASSICAL)


claim = partial(
    Claim,
    source="Giri, Fanany, Arymurthy 2016, https://arxiv.org/abs/1610.01757",
    setting="synthetic cohort of 62 subjects (no patients), each left out in turn; our 1-D CNN",
    run=left_out,
    measure="accuracy",
    arms=(*NETWORKS, *CLASSICAL),
    trained=lambda arm: "classical" if arm in CLASSICAL else arm.split()[0],
    threshold=0.0,
    note="part of the signal is a difference between hemispheres of unknown sign, which limits linear classifiers",
)

CLAIMS = (
    claim(
        name="stroke-cnn",
        sentence="The 1-D CNN with BN beats shallow classifiers.",
        published="accuracy .86 against .69 of the best shallow classifier (abstract; private data)",
        effect=gain_over_classical,
        meaning="accuracy on left-out subjects, CNN with BN (20 epochs) minus the best classical method",
    ),
    claim(
        name="stroke-cnn-f-score",
        sentence="The 1-D CNN with BN also beats shallow classifiers in the F-score.",
        published="F-score .861 against .72 (abstract; private data)",
        measure="F-score",
        effect=gain_over_classical,
        meaning="F-score of stroke on left-out subjects, CNN with BN (20 epochs) minus the best classical method",
    ),
    claim(
        name="stroke-bn",
        sentence="BN accelerates the training of the 1-D CNN.",
        published="stated in the abstract without a number",
        effect=lambda v: v["bn 5"] - v["none 5"],
        meaning="accuracy on left-out subjects after 5 epochs, BN minus none",
    ),
)

"""A 1-D CNN with BN tells stroke from EEG and EOG (Giri et al.).

Patients are not at hand: a *synthetic* cohort of their size (`fedbn.scenarios.stroke`), and a network of our design.
Subjects never stand on both sides: five folds by subject.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import torch

from fedbn.layers import convert
from fedbn.models.stroke_cnn import StrokeEEG1DCNN
from fedbn.scenario import Examples
from fedbn.scenarios.stroke import Cohort, cohort
from simulations.claims import Claim
from simulations.claims.bench import accuracy, seeded, shuffled, train


def folds(made: Cohort, k: int, seed: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Rows to train and to test on, ``k`` folds of whole subjects."""
    subjects = torch.randperm(int(made.subject.max()) + 1, generator=torch.Generator().manual_seed(seed))
    tests = [torch.isin(made.subject, part) for part in subjects.tensor_split(k)]
    return [((~t).nonzero()[:, 0], t.nonzero()[:, 0]) for t in tests]


def _examples(made: Cohort, rows: torch.Tensor, like: torch.Tensor) -> Examples:
    """Rows in units of the training rows' standard deviation."""
    x = (made.x - made.x[like].mean(0)) / made.x[like].std(0)
    return Examples(x[rows], made.y[rows], made.subject[rows])


def network(arm: str, seed: int, quick: bool) -> dict[str, float]:
    """Accuracy over all folds; the arm says BN or none, and the epochs of Adam 0.001 with batches of 16."""
    norm, _, epochs = arm.partition(" ")
    made = cohort(62, 6 if quick else 10, seed)
    right = []
    for fold, (train_rows, test_rows) in enumerate(folds(made, 5, seed)):
        data, test = (_examples(made, rows, train_rows) for rows in (train_rows, test_rows))
        with seeded(seed, "weights", fold):
            model = StrokeEEG1DCNN((1, 24), 2)
            if norm == "none":
                convert(model, "none")
            optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
            train(model, data, shuffled(len(data), 16, int(epochs), seed), optimizer)
        right.append(accuracy(model, test) * len(test))
    return {"accuracy": sum(right) / len(made.y)}


def shallow(arm: str, seed: int, quick: bool) -> dict[str, float]:
    """Accuracy over all folds of the best of k nearest neighbours, naive Bayes, logistic regression and SVM.

    The best is chosen by test accuracy, in favour of the shallow side.
    """
    if arm != "shallow":
        return network(arm, seed, quick)
    from sklearn.linear_model import LogisticRegression
    from sklearn.naive_bayes import GaussianNB
    from sklearn.neighbors import KNeighborsClassifier
    from sklearn.svm import SVC

    made = cohort(62, 6 if quick else 10, seed)
    right = np.zeros(4)
    for train_rows, test_rows in folds(made, 5, seed):
        data, test = (_examples(made, rows, train_rows) for rows in (train_rows, test_rows))
        for i, rule in enumerate((KNeighborsClassifier(), GaussianNB(), LogisticRegression(max_iter=2000), SVC())):
            rule.fit(data.x.flatten(1).numpy(), data.y.numpy())
            right[i] += (rule.predict(test.x.flatten(1).numpy()) == test.y.numpy()).sum()
    return {"accuracy": float(right.max() / len(made.y))}


claim = partial(
    Claim,
    source="Giri, Fanany, Arymurthy 2016, https://arxiv.org/abs/1610.01757",
    setting="synthetic cohort of 62 subjects (no patients), 5 folds by subject; our 1-D CNN",
    run=shallow,
    measure="accuracy",
)

CLAIMS = (
    claim(
        name="stroke-cnn",
        sentence="The 1-D CNN with BN beats shallow classifiers.",
        published="accuracy .86 against .69 of the best shallow comparator (abstract; private data)",
        arms=("bn 20", "shallow"),
        effect=lambda v: v["bn 20"] - v["shallow"],
        meaning="accuracy over folds, CNN with BN (20 epochs) minus the best shallow classifier",
        threshold=0.0,
    ),
    claim(
        name="stroke-bn",
        sentence="BN accelerates the training of the 1-D CNN.",
        published="said in the abstract, no number",
        arms=("bn 5", "none 5"),
        effect=lambda v: v["bn 5"] - v["none 5"],
        meaning="accuracy over folds after 5 epochs, BN minus none",
        threshold=0.0,
    ),
)

"""Figures and numbers of docs/learn.md, from short runs on digits: python docs/learn.py (about a minute)."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

import fedbn
from fedbn.data.population import Population
from fedbn.files import write_atomically
from fedbn_simulations.report.documents import brief_table, replace_block
from fedbn_simulations.report.plots import matrix_figure
from fedbn_simulations.report.style import INK, MARKERS, PAGE_WIDTH, PALETTE, direction, small_png, styled
from fedbn_simulations.results.summary import answer

DOCS = Path(__file__).parent
SCENARIO = "digits8:users=12:unseen=4"
ROUNDS = 20
CHANNEL = 0
"""The channel that is shown: the first one, not a selected one."""
COUNTS = (0, 2, 4, 8, 16, 32, 64, 111)
"""Numbers of unlabeled images after which unseen users are tested."""


def inputs_of_first_norm(model: nn.Module, x: Tensor) -> Tensor:
    """Inputs of the first BN layer, ``[channels, values]``."""
    layer = next(m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm))
    found: list[Tensor] = []
    handle = layer.register_forward_pre_hook(lambda _, args: found.append(args[0].detach()))
    with torch.no_grad():
        model(x)
    handle.remove()
    return found[0].transpose(0, 1).flatten(1)


@styled
def users_figure(values: list[Tensor]) -> Figure:
    """Distribution of one channel's inputs for each user, and of all users together."""
    figure = Figure(figsize=(PAGE_WIDTH, 2.2), layout="constrained")
    axes = figure.subplots()
    parts = axes.violinplot([v[CHANNEL].numpy() for v in values], showextrema=False, widths=0.8)
    for body in parts["bodies"]:
        body.set(facecolor=PALETTE[0], alpha=0.35)
    for i, v in enumerate(values, 1):
        axes.plot(i, float(v[CHANNEL].mean()), marker="o", color=PALETTE[0])
    pooled = torch.cat(values, 1)[CHANNEL]
    mean, sd = float(pooled.mean()), float(pooled.std())
    axes.axhline(mean, color=INK, linewidth=0.8)
    axes.axhspan(mean - sd, mean + sd, color=INK, alpha=0.08, linewidth=0)
    axes.set_xticks(range(1, len(values) + 1), [str(i) for i in range(1, len(values) + 1)])
    axes.set_title(f"Inputs of channel {CHANNEL + 1} of the first BN layer")
    axes.set_xlabel("user (dot: the user's mean; line and gray band: mean ± standard deviation of all)")
    axes.set_ylabel("value")
    return figure


@styled
def variance_figure(values: list[Tensor]) -> Figure:
    """Each channel's standard deviation by the mean of the users' variances, and by all users together."""
    averaged = torch.stack([v.var(1) for v in values]).mean(0).sqrt()
    pooled = torch.cat(values, 1).var(1).sqrt()
    figure = Figure(figsize=(PAGE_WIDTH, 2.2), layout="constrained")
    axes = figure.subplots()
    channels = range(1, len(pooled) + 1)
    axes.vlines(channels, averaged, pooled, color=INK, linewidth=0.8)
    axes.plot(channels, pooled, linestyle="", marker="o", color=PALETTE[0], label="all users together (pooled)")
    axes.plot(
        channels, averaged, linestyle="", marker="s", color=PALETTE[1], label="mean of the users' variances (naive)"
    )
    axes.set_ylim(0, 1.1 * float(pooled.max()))
    axes.set_xticks(list(channels))
    axes.set_title("Standard deviation by which a channel is divided")
    axes.set_xlabel("channel of the first BN layer")
    axes.set_ylabel("standard deviation")
    axes.grid(axis="y")
    axes.legend(loc="lower right")
    return figure


def adapted_accuracies(model: nn.Module, population: Population) -> dict[str, list[float]]:
    """Accuracy of each unseen user after `COUNTS` unlabeled images."""
    bank = fedbn.personalize(model, "pseudo:n0=64")
    found = {}
    for user in (population.users[i] for i in population.unseen):
        accuracies = []
        for before, count in zip((0, *COUNTS), COUNTS):
            for image in user.train.x[before:count]:
                bank(image[None], user=user.name)
            with bank.frozen():
                right = bank(user.test.x, user=user.name).argmax(1) == user.test.y
            accuracies.append(float(right.float().mean()))
        found[user.name] = accuracies
    return found


@styled
def adaptation_figure(accuracies: dict[str, list[float]]) -> Figure:
    """Accuracy of each unseen user by the number of unlabeled images that have arrived."""
    figure = Figure(figsize=(PAGE_WIDTH, 2.4), layout="constrained")
    axes = figure.subplots()
    for i, (name, values) in enumerate(accuracies.items()):
        axes.plot(range(len(COUNTS)), values, marker=MARKERS[i], color=PALETTE[i], label=name)
    axes.axhline(0.1, color=INK, linestyle=":", linewidth=0.8)
    axes.set_xticks(range(len(COUNTS)), [str(n) for n in COUNTS])
    axes.set_ylim(0, 1)
    axes.set_title("Unseen users")
    axes.set_xlabel("unlabeled images that have arrived (dotted line: guessing)")
    axes.set_ylabel(f"accuracy ({direction(True)})")
    axes.grid(axis="y")
    figure.legend(loc="outside right center")
    return figure


def main() -> None:
    """Train, draw the figures and update the page."""
    trained = fedbn.federate(SCENARIO, "global-pooled", rounds=ROUNDS, eval_every=ROUNDS)
    population, model = trained.population, trained.model()
    seen = [user for i, user in enumerate(population.users) if i not in population.unseen]
    values = [inputs_of_first_norm(model, user.train.x) for user in seen]
    with tempfile.TemporaryDirectory() as out:
        results = fedbn.compare(
            SCENARIO, ["fedavg", "global-pooled", "fedbn", "groupnorm"], seeds=3, rounds=ROUNDS, eval_every=ROUNDS,
            out=out, progress=False,
        )  # fmt: skip
        figures = {
            "users": users_figure(values),
            "variance": variance_figure(values),
            "matrix": matrix_figure(results),
            "adaptation": adaptation_figure(adapted_accuracies(model, population)),
        }
        replace_block(DOCS / "learn.md", "learn", f"{brief_table(results)}\n{answer(results)}\n")
    for name, figure in figures.items():
        write_atomically(DOCS / "learn" / f"{name}.png", small_png(figure))


if __name__ == "__main__":
    sys.exit(main())

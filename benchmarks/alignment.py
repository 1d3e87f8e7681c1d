"""``python -m benchmarks.alignment``: CPU time of an alignment per window, with one user and with 100 users per call.

The windows are later recordings of HAPT, in recorded order, and the network is untrained. Each figure is the least of
several passes, in one thread, because other load only adds time.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from fedbn.models import build
from fedbn.online import fit_alignment, personalize
from fedbn.online.personalized import Personalized
from fedbn.scenarios.base import scenario
from fedbn_simulations.report.documents import replace_block
from fedbn_simulations.results.formatting import markdown_table

PASSES, TOGETHER, CALLS = 3, 100, 30
"""Passes over the windows; users of a batch, and batches of a pass."""


def milliseconds(run: Callable[[], object], windows: int) -> float:
    """CPU time per window."""
    start = time.process_time()
    run()
    return 1000 * (time.process_time() - start) / windows


def one_user(net: Callable[[Tensor], object], x: Tensor) -> Callable[[], None]:
    """Windows one by one."""

    def run() -> None:
        for window in x.split(1):
            net(window)

    return run


def many_users(net: Personalized, x: Tensor) -> Callable[[], None]:
    """A window of each user per call, each user at another place of the recordings."""
    users = [f"user{i}" for i in range(TOGETHER)]

    def run() -> None:
        for t in range(CALLS):
            net(x[(t + torch.arange(TOGETHER)) % len(x)], user=users)

    return run


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(prog="benchmarks.alignment", description=__doc__)
    parser.add_argument("--align", default="rotation", help="the alignment")
    parser.add_argument("--into", type=Path, help="document with a block align-cost")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    population = scenario("hapt").load(0)
    classes, seen = len(population.classes), [population.users[i] for i in population.seen]
    aligner = fit_alignment(arguments.align, [(u.train.x, u.train.y) for u in seen], classes, population.triples)
    model = build("har-cnn", (6, 128), classes, 0).eval()
    x = torch.cat([population.users[i].test.x for i in population.unseen[:2]])

    def plain(window: Tensor) -> Tensor:
        with torch.no_grad():
            return model(window)

    forms = {"personalized, without alignment": None, f"personalized, with `{arguments.align}`": aligner}
    found: dict[str, list[float]] = {"network alone": [], **{name: [] for name in forms}}
    together: dict[str, list[float]] = {name: [] for name in forms}
    for _ in range(PASSES):
        found["network alone"].append(milliseconds(one_user(plain, x), len(x)))
        for name, align in forms.items():
            net = personalize(model, "source", align=align)
            found[name].append(milliseconds(one_user(lambda w, n=net: n(w, user="ann"), x), len(x)))
            net = personalize(model, "source", align=align)
            together[name].append(milliseconds(many_users(net, x), CALLS * TOGETHER))
    rows = [
        {
            "CPU ms per window": name,
            "one user": f"{min(values):.2f}",
            f"{TOGETHER} users per call": f"{min(together[name]):.2f}" if name in together else "",
        }
        for name, values in found.items()
    ]
    table = markdown_table(rows)
    print(table)
    if arguments.into:
        replace_block(arguments.into, "align-cost", table)


if __name__ == "__main__":
    main()

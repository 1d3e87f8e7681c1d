"""``fedbn export``: save a user's model from a finished comparison to a standalone file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedbn.errors import UserError, unknown
from simulations.cli.options import AsJson, console

if TYPE_CHECKING:
    from torch import Tensor, nn


def export(
    directory: Annotated[Path, typer.Argument(help="Directory of a finished comparison.")],
    out: Annotated[
        Path, typer.Option(help="Output file: .onnx, .pt2 (torch.export) or .safetensors (the state dict).")
    ],
    strategy: Annotated[str, typer.Option(help="Strategy, as named in the comparison.")],
    user: Annotated[
        str | None, typer.Option(help="User whose model to export.", show_default="the model of an unseen user")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the run.")] = 0,
    rule: Annotated[
        str | None,
        typer.Option(
            help="First adapt the model to the user's unlabeled training windows by this rule, e.g. pseudo:n0=64.",
            show_default=False,
        ),
    ] = None,
    fold: Annotated[bool, typer.Option("--fold", help="Fold BN into the layers before it.")] = False,
    as_json: AsJson = False,
) -> None:
    """Save one user's model to a standalone file.

    The file is read back, and its outputs are checked against the model's.

    Example: [bold]fedbn export results/hapt --strategy fedbn --user "user 01" --out model.onnx[/]
    """
    from fedbn.integrations.export import export as write
    from fedbn.integrations.export import fold_batch_norm

    if rule is not None and user is None:
        raise UserError("--rule adapts to one user's windows: name the user with --user")
    model, rows, classes = _model(directory, strategy, seed, user)
    if rule is not None:
        model = _adapted(model, rule, rows)
    difference = write(fold_batch_norm(model) if fold else model, rows[:8], out)
    shape = [int(n) for n in rows.shape[1:]]
    found = {
        "file": str(out),
        "bytes": out.stat().st_size,
        "input": shape,
        "classes": classes,
        "difference": difference,
    }
    if as_json:
        print(json.dumps(found, indent=1))
    else:
        size = f"{out}: {found['bytes']:,} bytes, for inputs of shape {shape}"
        text = f"{size}; its outputs differ from the model's by at most {difference:.1g}"
        console.print(text, highlight=False, markup=False)
        console.print(f"outputs by class: {', '.join(classes)}", highlight=False, markup=False)


def _model(directory: Path, strategy: str, seed: int, user: str | None) -> tuple[nn.Module, Tensor, list[str]]:
    """The model of a user (None: an unseen user), training rows of the user (None: the first seen user), classes."""
    from fedbn.federation.client import user_state
    from fedbn.federation.run import Run
    from fedbn.federation.setup import build_context
    from fedbn.files import read_json
    from simulations.experiments.tasks import CHECKPOINT
    from simulations.results.comparison import Comparison
    from simulations.results.files import recompute
    from simulations.storage.checkpoint import load_outcome

    runs = Comparison.load(directory).runs
    if strategy not in set(runs["strategy"]):
        raise unknown("strategy of this comparison", strategy, runs["strategy"])
    found = runs[(runs["strategy"] == strategy) & (runs["seed"] == seed)]
    if found.empty:
        raise unknown("seed of this comparison", str(seed), map(str, runs["seed"].unique()))
    place = directory / "runs" / found["run"].iloc[0]
    run = Run.from_dict(read_json(place / "result.json", recompute(directory))["run"])
    ctx = build_context(run)
    outcome = load_outcome(place / CHECKPOINT, run, ctx.population.sources)
    names = [u.name for u in ctx.population.users]
    if user is None:
        state, index = ctx.assemble(outcome.server.serving, None), ctx.population.seen[0]
    elif user not in names:
        raise unknown("user", user, names)
    else:
        index = names.index(user)
        received = outcome.server.state_for(ctx, index, serving=True)
        state = user_state(ctx, index, received, outcome.client_states.get(index))
    return ctx.load(state), ctx.population.users[index].train.x, list(ctx.population.classes)


def _adapted(model: nn.Module, rule: str, rows: Tensor) -> nn.Module:
    """A plain copy of the model, adapted to the rows one by one."""
    from fedbn.online import personalize

    network = personalize(model, rule)
    for place in range(len(rows)):
        network(rows[place : place + 1], user="user")
    return network.export("user")

"""``fedbn export``: save a user's model from a finished comparison to a standalone file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedbn.errors import UserError, unknown
from fedbn_simulations.cli.options import AsJson, console

if TYPE_CHECKING:
    from torch import Tensor, nn

    from fedbn.federation.context import RunContext
    from fedbn.nn.roles import State

ROWS = 64
"""Number of test windows on which the outputs of the file and of the model are compared."""


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

    The file is read back, and its outputs are checked against the model's. The state dict is for the network of the
    comparison's --model; strategies that compute with other layers, such as groupnorm or iabn, need .pt2 or .onnx.

    Example: [bold]fedbn export results/hapt --strategy fedbn --user "user 01" --out model.onnx[/]
    """
    import torch

    from fedbn.integrations.export import export as write
    from fedbn.models import build

    if fold and out.suffix == ".safetensors":
        raise UserError("--fold changes the layers, so the weights alone fit no network: use --out with .pt2 or .onnx")
    if rule is not None and user is None:
        raise UserError("--rule adapts to one user's windows: name the user with --user")
    ctx, state, index = _state(directory, strategy, seed, user)
    users = ctx.population.users
    model = ctx.load(state)
    if rule is not None:
        model = _adapted(model, rule, users[index].train.x)
    plain = build(ctx.run.model, ctx.population.shape, ctx.outputs, ctx.run.seed).to(ctx.run.device)
    example = torch.cat([u.test.x[:ROWS] for u in (users[index], *users)][:ROWS])
    difference = write(model, example, out, fold=fold, plain=plain)
    shape = list(ctx.population.shape)
    classes = list(ctx.population.classes)
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
        if classes:
            console.print(f"outputs by class: {', '.join(classes)}", highlight=False, markup=False)


def _state(directory: Path, strategy: str, seed: int, user: str | None) -> tuple[RunContext, State, int]:
    """Context of a run, the state that it evaluates a user with (None: an unseen user), and the user's index.

    Without an unseen user's name, the index is that of the first seen user.
    """
    from fedbn.federation.client import user_state
    from fedbn.federation.run import Run
    from fedbn.federation.setup import build_context
    from fedbn.files import read_json
    from fedbn_simulations.experiments.tasks import CHECKPOINT
    from fedbn_simulations.results.comparison import Comparison
    from fedbn_simulations.results.files import recompute
    from fedbn_simulations.storage.checkpoint import load_outcome

    runs = Comparison.load(directory).runs
    known = set(runs["strategy"])
    if strategy not in known and (strategy := _resolved(strategy)) not in known:
        raise unknown("strategy of this comparison", strategy, known)
    found = runs[(runs["strategy"] == strategy) & (runs["seed"] == seed)]
    if found.empty:
        raise unknown("seed of this comparison", str(seed), map(str, runs["seed"].unique()))
    place = directory / "runs" / found["run"].iloc[0]
    run = Run.from_dict(read_json(place / "result.json", recompute(directory))["run"])
    ctx = build_context(run)
    outcome = load_outcome(place / CHECKPOINT, run, ctx.population.sources)
    names = [u.name for u in ctx.population.users]
    if user is not None and user not in names:
        raise unknown("user", user, names)
    index = ctx.population.seen[0] if user is None else names.index(user)
    if ctx.treatment.is_local_only and (user is None or index in ctx.population.unseen):
        raise UserError(
            f"strategy {strategy!r} shares no model, so an unseen user has none: name a seen user with --user, e.g. "
            f"{names[ctx.population.seen[0]]!r}"
        )
    if user is None and outcome.server.groups:
        raise UserError(f"strategy {strategy!r} has a model for each group of users: name a user with --user")
    if user is None:
        return ctx, ctx.assemble(outcome.server.serving, None), index
    received = outcome.server.state_for(ctx, index, serving=True)
    return ctx, user_state(ctx, index, received, outcome.client_states.get(index)), index


def _resolved(strategy: str) -> str:
    """Name of a strategy that may be given by an alias; the text itself if it is unknown."""
    from fedbn.personalization.treatment import treatment

    try:
        return str(treatment(strategy))
    except UserError:
        return strategy


def _adapted(model: nn.Module, rule: str, rows: Tensor) -> nn.Module:
    """A plain copy of the model, adapted to the rows one by one."""
    from fedbn.online import personalize

    network = personalize(model, rule)
    for place in range(len(rows)):
        network(rows[place : place + 1], user="user")
    return network.export("user")

"""``fedbn export``: a user's model out of a finished comparison, for use elsewhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from fedbn.errors import UserError, unknown

if TYPE_CHECKING:
    from torch import Tensor, nn

console = Console()


def export(
    directory: Annotated[Path, typer.Argument(help="Directory of a finished comparison.")],
    out: Annotated[Path, typer.Option(help="File: .onnx, .pt2 (torch.export) or .safetensors (the state dict).")],
    strategy: Annotated[str, typer.Option(help="Whose model, as the comparison names it.")],
    user: Annotated[str | None, typer.Option(help="User whose model; default: what a newcomer is given.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the run.")] = 0,
    rule: Annotated[
        str | None,
        typer.Option(help="First let this rule follow the user's unlabeled training windows, e.g. pseudo:n0=64."),
    ] = None,
    fold: Annotated[bool, typer.Option("--fold", help="Fold BN into the layers before it.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """Write one user's model to a file that needs nothing of this project, and check what it says.

    Example: [bold]fedbn export results/hapt --strategy fedbn --user "user 01" --out model.onnx[/]
    """
    from fedbn.integrations.export import export as write
    from fedbn.integrations.export import folded

    if rule is not None and user is None:
        raise UserError("--rule follows one user's windows: say --user")
    model, rows = _model(directory, strategy, seed, user)
    if rule is not None:
        model = _followed(model, rule, rows)
    difference = write(folded(model) if fold else model, rows[:8], out)
    shape = [int(n) for n in rows.shape[1:]]
    found = {"file": str(out), "bytes": out.stat().st_size, "input": shape, "difference": difference}
    if as_json:
        print(json.dumps(found, indent=1))
    else:
        console.print(
            f"{out}: {found['bytes']:,} bytes, takes rows of shape {shape}; read back, its outputs differ from the "
            f"model's by at most {difference:.1g}",
            highlight=False,
            markup=False,
        )


def _model(directory: Path, strategy: str, seed: int, user: str | None) -> tuple[nn.Module, Tensor]:
    """The model of a user (None: of a newcomer), and training rows of the user's (None: of the first seen user)."""
    from fedbn.federation.client import user_state
    from fedbn.federation.run import Run
    from fedbn.federation.setup import build_context
    from simulations.experiments.tasks import CHECKPOINT
    from simulations.results.comparison import Comparison
    from simulations.storage.checkpoint import load_outcome

    runs = Comparison.load(directory).runs
    if strategy not in set(runs["strategy"]):
        raise unknown("strategy of this comparison", strategy, runs["strategy"])
    found = runs[(runs["strategy"] == strategy) & (runs["seed"] == seed)]
    if found.empty:
        raise unknown("seed of this comparison", str(seed), map(str, runs["seed"].unique()))
    place = directory / "runs" / found["run"].iloc[0]
    run = Run.from_dict(json.loads((place / "result.json").read_text(encoding="utf-8"))["run"])
    ctx = build_context(run)
    outcome = load_outcome(place / CHECKPOINT, run, ctx.population.sources)
    names = [u.name for u in ctx.population.users]
    if user is None:
        state, index = ctx.assemble(outcome.server.serving, None), ctx.population.seen[0]
    elif user not in names:
        raise unknown("user", user, names)
    else:
        index = names.index(user)
        received = outcome.server.sends(ctx, index, serving=True)
        state = user_state(ctx, index, received, outcome.client_states.get(index))
    return ctx.load(state), ctx.population.users[index].train.x


def _followed(model: nn.Module, rule: str, rows: Tensor) -> nn.Module:
    """A plain copy whose statistics have followed the rows, one after the other."""
    from fedbn.online import personalize

    network = personalize(model, rule)
    for place in range(len(rows)):
        network(rows[place : place + 1], user="user")
    return network.export("user")

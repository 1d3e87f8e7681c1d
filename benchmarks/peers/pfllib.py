"""PFLlib's own servers and clients on other data: ``python -m benchmarks.peers.pfllib RUN THREADS CLONE``.

PFLlib is a program, not a package, so it needs a clone of https://github.com/TsingZ0/PFLlib. It reads the data of each
client from a file in every round and drops incomplete batches. Its ``FedBN`` finds BN by the letters ``bn`` in names of
parameters (`with_bn_names`). Zhang et al., *PFLlib: A Beginner-Friendly and Comprehensive Personalized Federated
Learning Library and Benchmark*, 2023, https://arxiv.org/abs/2312.04992
"""

from __future__ import annotations

import contextlib
import io
import sys
import tempfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.rounds import Meter, context_from_arguments
from fedbn.config import Plan
from fedbn.data.examples import User
from fedbn.errors import UserError
from fedbn.nn.roles import is_norm


def with_bn_names(model: nn.Module) -> nn.Module:
    """Rename the normalization layers in each `torch.nn.Sequential` of a model, in place: ``1`` becomes ``bn1``.

    >>> list(with_bn_names(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))).state_dict())[2]
    'bn1.weight'
    """
    for part in model.modules():
        if isinstance(part, nn.Sequential):
            named = ((f"bn{name}" if is_norm(m) else name, m) for name, m in part._modules.items())
            part._modules = OrderedDict(named)
    return model


def write_data(users: Sequence[User], folder: Path) -> None:
    """Write the data of users as PFLlib's directory ``dataset/peer``."""
    for part in ("train", "test"):
        place = folder / "dataset" / "peer" / part
        place.mkdir(parents=True)
        for i, user in enumerate(users):
            examples = getattr(user, part)
            np.savez(place / f"{i}.npz", data={"x": examples.x.numpy(), "y": examples.y.numpy()})


@contextlib.contextmanager
def server(
    clone: Path,
    algorithm: str,
    users: Sequence[User],
    model: nn.Module,
    classes: int,
    plan: Plan,
    evaluate: Callable[[Any], None],
) -> Iterator[Any]:
    """A server of PFLlib in a temporary directory with the data of its clients; ``train()`` runs ``rounds + 1`` rounds.

    Args:
        clone: clone of PFLlib.
        algorithm: ``FedAvg`` or ``FedBN``.
        users: one client each.
        model: initial model.
        classes: number of classes.
        plan: rounds, local epochs, batch size and learning rate.
        evaluate: called with the server before each round, instead of PFLlib's evaluation.

    Raises:
        UserError: the path is not a clone of PFLlib.
    """
    if not (clone / "system" / "flcore").is_dir():
        raise UserError(f"{clone} has no directory 'system/flcore': give the directory of a clone of PFLlib")
    sys.path.insert(0, str(clone.resolve() / "system"))
    sys.modules.setdefault("h5py", ModuleType("h5py"))  # imported for a file that is not written here
    from flcore.servers.serveravg import FedAvg  # type: ignore[import-not-found]
    from flcore.servers.serverbn import FedBN  # type: ignore[import-not-found]

    class Server({"FedAvg": FedAvg, "FedBN": FedBN}[algorithm]):  # type: ignore[misc]
        def evaluate(self, acc: object = None, loss: object = None) -> None:
            evaluate(self)

        def save_results(self) -> None: ...

        def save_global_model(self) -> None: ...

    with tempfile.TemporaryDirectory() as name, contextlib.redirect_stdout(io.StringIO()):
        write_data(users, Path(name))
        Path(name, "system").mkdir()
        with contextlib.chdir(Path(name, "system")):  # it reads ../dataset
            yield Server(_options(model, len(users), classes, plan), 0)


def _options(model: nn.Module, clients: int, classes: int, plan: Plan) -> SimpleNamespace:
    """The options of PFLlib's command line that its servers read, with its own defaults where nothing is compared."""
    return SimpleNamespace(
        model=model,
        device="cpu",
        dataset="peer",
        num_classes=classes,
        num_clients=clients,
        global_rounds=plan.rounds,
        local_epochs=plan.local_epochs,
        batch_size=plan.batch_size,
        local_learning_rate=plan.lr,
        learning_rate_decay=False,
        learning_rate_decay_gamma=0.99,
        join_ratio=1.0,
        random_join_ratio=False,
        few_shot=0,
        algorithm="peer",
        time_select=False,
        time_threthold=10000,
        goal="peer",
        save_folder_name="items",
        top_cnt=100,
        auto_break=False,
        eval_gap=1,
        client_drop_rate=0.0,
        train_slow_rate=0.0,
        send_slow_rate=0.0,
        dlg_eval=False,
        dlg_gap=100,
        batch_num_per_client=2,
        num_new_clients=0,
        fine_tuning_epoch_new=0,
    )


def main() -> None:
    """Run a round of ``FedBN`` for each line on standard input."""
    ctx, threads = context_from_arguments()
    torch.set_num_threads(threads)
    meter, started = Meter(), False

    def between(_: object) -> None:
        nonlocal started
        if started:
            meter.reply()
        started = True
        meter.wait()

    users = [ctx.population.users[i] for i in ctx.trainers]
    model, classes = with_bn_names(ctx.load(ctx.initial)), len(ctx.population.classes)
    with server(Path(sys.argv[3]), "FedBN", users, model, classes, ctx.run.plan, between) as peer:
        peer.train()


if __name__ == "__main__":
    main()

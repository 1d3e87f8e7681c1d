"""Audit of a Flower app: what its messages contain, per role, and what its server does with it.

The app runs as it is, for two rounds if its run-config has the number. The lints of `fedbn.auditing` check its model;
those here check what can only be seen while it runs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import chdir, contextmanager
from dataclasses import asdict, dataclass, field
from tempfile import TemporaryDirectory
from typing import Any

from flwr.app import ArrayRecord, Message
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

from fedbn.auditing.audit import audit
from fedbn.auditing.lints import LEVELS, Finding
from fedbn.nn.roles import Role, keeps_statistics
from fedbn.strategies.global_naive import GlobalNaive
from fedbn_clients.entries import Entries, build, entries, model_record
from fedbn_simulations.engines.simulation import DEFAULT_SUPERNODES, run_simulation
from fedbn_simulations.flower.apps import FlowerApp
from fedbn_simulations.flower.normalized import app_model, started_strategies
from fedbn_simulations.flower.strategies import NOISY, strategy_chain

ROUNDS_KEY = "num-server-rounds"

OF_TRAINED_MODELS = ("untrained",)
"""Lints that say nothing about a model that has just been built."""


@dataclass(frozen=True)
class AppAudit:
    """Audit of an app.

    Attributes:
        app: name of the app.
        model: reference of its model.
        strategies: classes of the Flower strategies that its server starts, wrappers first.
        traffic: for each role its entries, and bytes down and up per client and round, as observed.
        findings: most severe first.
    """

    app: str
    model: str
    strategies: tuple[str, ...]
    traffic: tuple[dict[str, Any], ...]
    findings: tuple[Finding, ...]

    def as_dict(self) -> dict[str, Any]:
        """The audit as plain values, for JSON."""
        return asdict(self)


@dataclass
class _Observed:
    """What the messages of a run contain.

    Attributes:
        table: entries of the model.
        down, up: bytes of each entry in the first message and reply of training.
        dtypes: dtype of each entry in the messages, in order.
    """

    table: Entries
    down: dict[str, int] = field(default_factory=dict)
    up: dict[str, int] = field(default_factory=dict)
    dtypes: dict[str, list[str]] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)

    def add(self, message: Message, reply: Message) -> None:
        """Record a message and its reply."""
        if reply.has_error():
            self.errors.append(str(reply.error.reason))
        for content, sizes in ((message.content, self.down), (reply.content if reply.has_content() else None, self.up)):
            record = model_record(content)[1] if content is not None else None
            if record is None:
                continue
            if not sizes:
                sizes.update(self._sizes(record))
            if sizes is self.down:
                for key, name in self.table.names(record).items():
                    self.dtypes.setdefault(name, []).append(str(record[key].numpy().dtype))

    def _sizes(self, record: ArrayRecord) -> dict[str, int]:
        return {name: record[key].numpy().nbytes for key, name in self.table.names(record).items()}

    def traffic(self) -> Iterator[dict[str, Any]]:
        """One row per role."""
        roles = self.table.ownership.roles
        for role in dict.fromkeys(roles.values()):
            names = [name for name in roles if roles[name] is role]
            down, up = (sum(sizes.get(name, 0) for name in names) for sizes in (self.down, self.up))
            yield {"role": str(role), "entries": len(names), "bytes_down": down, "bytes_up": up}


def audit_app(
    app: FlowerApp, model: str | None = None, num_supernodes: int | None = None, run_config: tuple[str, ...] = ()
) -> AppAudit:
    """Run an app and audit it.

    Args:
        app: the app.
        model: reference of its model; None: that of its pyproject.toml.
        num_supernodes: number of nodes; None: its default.
        run_config: overrides of its run-config.

    Raises:
        UserError: the model is not known, or the messages contain other arrays than the model's.
        Exception: raised by the ServerApp.
    """
    config = app.run_config(run_config)
    if ROUNDS_KEY in config:
        config[ROUNDS_KEY] = 2  # the second round has what the server made of the first
    nodes = num_supernodes or app.num_supernodes or DEFAULT_SUPERNODES
    with app.loaded() as (server, client):
        model_fn, reference = app_model(app, model)
        observed = _Observed(entries(model_fn, GlobalNaive()))
        training: set[str] = set()
        with started_strategies() as started, _modes(training) as mode:

            def observe(message: Message, context: Any) -> Message:
                mode.evaluates = message.metadata.message_type.startswith("evaluate")
                return client(message, context)

            with TemporaryDirectory() as folder, chdir(folder):  # for what the app writes
                run_simulation(server, observe, nodes, run_config=config, on_reply=observed.add)
        chain = [type(s) for strategy in started for s in strategy_chain(strategy)]
        findings = [f for f in audit(build(model_fn)).findings if f.lint not in OF_TRAINED_MODELS]
        findings += _lint(observed, chain, training)
    return AppAudit(
        app.name,
        reference,
        tuple(cls.__name__ for cls in chain),
        tuple(observed.traffic()),
        tuple(sorted(findings, key=lambda f: LEVELS.index(f.level))),
    )


def _lint(observed: _Observed, chain: list[type], training: set[str]) -> Iterator[Finding]:
    roles: Mapping[str, Role] = observed.table.ownership.roles
    if observed.errors:
        message = f"{len(observed.errors)} replies are errors, such as {observed.errors[0]!r}"
        yield Finding("error", "client-errors", (), message, "correct the ClientApp; servers only log such errors")
    counters = [n for n, found in observed.dtypes.items() if roles[n] is Role.COUNTER and len(set(found)) > 1]
    if counters:
        dtypes = " and ".join(dict.fromkeys(observed.dtypes[counters[0]]))
        message = f"the server averages counters: their types in the messages are {dtypes}"
        fix = "wrap the strategy: fedbn_simulations.flower.strategies.normalization(strategy, model_fn, ...)"
        yield Finding("warning", "averaged-counters", tuple(counters), message, fix)
    noisy = next((cls.__name__ for cls in chain if issubclass(cls, NOISY)), None)
    statistics = [n for n in observed.up if roles[n] is Role.STATISTICS]
    if noisy and statistics:
        message = f"{noisy} clips and adds noise to running statistics, and variances can become negative"
        fix = "keep statistics local: mods=[fedbn_clients.mods.normalization(model_fn, 'silobn')] and the wrapper"
        yield Finding("error", "statistics-under-dp", tuple(statistics), message, fix)
    if training:
        message = "evaluation runs in training mode, which ignores running statistics"
        yield Finding(
            "error", "evaluates-in-training-mode", tuple(sorted(training)), message, "call model.eval() before"
        )


@dataclass
class _Mode:
    """Whether the message that is being handled asks for an evaluation."""

    evaluates: bool = False


@contextmanager
def _modes(found: set[str]) -> Iterator[_Mode]:
    """Collect the types of the layers with running statistics that evaluate in training mode."""
    mode = _Mode()

    def check(module: nn.Module, _inputs: Any) -> None:
        if mode.evaluates and module.training and keeps_statistics(module):
            found.add(type(module).__name__)

    with register_module_forward_pre_hook(check):
        yield mode

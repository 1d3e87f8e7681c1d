"""Flower mods that apply this project's methods to any ClientApp.

`normalization` lets the clients of an app keep the entries that a strategy declares local, without a change in the app.
`adaptation` lets the statistics of an app that predicts follow the client's stream.

Rule of the messages: a reply has exactly the keys of the message, in its order. Entries that stay at the client are
returned as they were received. So everything that a server does with keys, order and types continues to work.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp.typing import ClientAppCallable
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

from fedbn.errors import UserError
from fedbn.nn.roles import Role
from fedbn.online.personalized import Personalized, personalize
from fedbn.online.prior import LayerPrior, summarize_windows
from fedbn.online.rules.base import Rule
from fedbn.online.rules.base import rule as parse_rule
from fedbn.online.stream import USER
from fedbn.statistics.consensus import flatten, replay
from fedbn.strategies.base import NormStrategy
from fedbn.strategies.ownership import LOCAL
from fedbn_clients.entries import Entries, ModelFn, build, entries, model_record, resolve_strategy
from fedbn_clients.persistence import FORMAT_VERSION, read_states, state_folder, write_states
from fedbn_clients.records import aggregates_from, arrays, prior_from
from fedbn_clients.training_mode import notice_training_mode, warn_once

NORMALIZATION_STATE = "fedbn.normalization"
"""Record of ``Context.state`` with the entries that stay at the client."""

ADAPTATION_STATE = "fedbn.adaptation"
"""Record of ``Context.state`` with the state of the rule."""

SYNC = "fedbn.sync_statistics"
"""Record of a message that asks for moments; the mod replies to it in place of the app."""

SUMMARIES = "fedbn.window_summaries"
"""Record of a message that asks for what a population prior needs; the mod replies to it in place of the app."""

MOMENTS = "moments"
"""Record of the reply to a message with `SYNC` or `SUMMARIES`; empty at the end of a synchronization."""

PRIOR = "fedbn.prior"
"""Record with the prior of `adaptation` in a message in which the app predicts."""

Calibration = Callable[[Context], Tensor | Iterable[Tensor]]
"""Unlabeled data of a client: one tensor ``[n, *shape]``, or batches."""


def normalization(
    model_fn: ModelFn, strategy: NormStrategy | str, calibration: Calibration | None = None
) -> NormalizationMod:
    """Flower mod that applies a normalization strategy to the clients of any app.

    Args:
        model_fn: function or class that builds the app's network. Only its types and names are used.
        strategy: for example ``fedbn``. The server aggregates all other entries as before; strategies that aggregate
            statistics also need `fedbn_simulations.flower.strategies.normalization`.
        calibration: unlabeled data of the client, for ``global-recalibrated`` and ``static-bn``, and for
            `fedbn_simulations.flower.calibration.population_prior`.

    Raises:
        UserError: an unknown strategy, one that cannot be applied from outside an app, or missing calibration data.

    >>> from flwr.clientapp import ClientApp
    >>> from fedbn.models.small_cnn import SmallCNN
    >>> app = ClientApp(mods=[normalization(lambda: SmallCNN((1, 8, 8), 10), "fedbn")])
    """
    resolved = resolve_strategy(strategy)
    if resolved.syncs_statistics and calibration is None:
        raise UserError(
            f"strategy {resolved.name!r} measures statistics at the clients: pass calibration=lambda context: batches"
        )
    return NormalizationMod(model_fn, resolved, calibration)


@dataclass(frozen=True)
class NormalizationMod:
    """The mod of `normalization`. An object, because Ray pickles a ClientApp with everything that it refers to."""

    model_fn: ModelFn
    strategy: NormStrategy
    calibration: Calibration | None = None

    def __call__(self, message: Message, context: Context, call_next: ClientAppCallable) -> Message:
        """Pass a message to the app with the client's entries; remove them from the reply.

        Raises:
            UserError: the arrays are not those of the model, or SecAgg+ runs inside this mod.
        """
        if not message.has_content():
            return call_next(message, context)
        _require_no_inner_secure_aggregation(message.content)
        key, received = model_record(message.content)
        if received is None or _is_foreign(message, received, self._entries):
            return call_next(message, context)
        names = self._entries.names(received)
        own = self._load(context)
        model = ArrayRecord({k: self._value(names[k], array, own) for k, array in received.items()})
        try:
            if SYNC in message.content:
                return self._sync(message, context, {names[k]: array for k, array in model.items()})
            if SUMMARIES in message.content:  # of all clients under the same network, that of the server
                return self._summarize(message, context, {names[k]: array for k, array in received.items()})
            # Outer mods and the engine hold the message, so the app gets a copy.
            inner = copy.copy(message)
            inner.content = RecordDict({**message.content, key: model})
            with notice_training_mode(active=not _is_train(message)):
                reply = call_next(inner, context)
            if reply.has_content():
                trained = self._separate(message, reply, key, received)
                if trained:
                    own = own | trained
                    self._save(context, own)
            return reply
        finally:
            if own:
                context.state[NORMALIZATION_STATE] = ArrayRecord(own)

    @property
    def _entries(self) -> Entries:
        return entries(self.model_fn, self.strategy)

    def _value(self, name: str, array: Array, own: Mapping[str, Array]) -> Array:
        """The client's own value of an entry, or the received one with the model's dtype."""
        if name in own:
            return own[name]
        if self._entries.ownership.roles[name] is Role.COUNTER:  # FedAvg turns counters into float64
            return Array(torch.from_numpy(array.numpy()).to(self._entries.dtypes[name]).numpy())
        return array

    def _separate(self, message: Message, reply: Message, key: str, received: ArrayRecord) -> dict[str, Array]:
        """Replace local entries of a reply by the received ones. Returns the client's entries after training."""
        ownership, names = self._entries.ownership, self._entries.names(received)
        records = {name: record for name, record in reply.content.array_records.items() if record}
        trained: dict[str, Array] = {}
        if _is_train(message) and records:
            key = key if key in records else next(iter(records))
            record = records.pop(key)
            values = {name: record[k] for k, name in self._entries.names(record).items()}
            if difference := sorted(values.keys() ^ set(names.values())):
                raise UserError(
                    f"the arrays of the reply and of the message differ in {', '.join(difference[:3])}: let the app "
                    "return all arrays that it received"
                )
            trained = {name: values[name] for name in ownership.retained if name in values}
            reply.content[key] = ArrayRecord(
                {k: a if ownership.owner(names[k]) is LOCAL else values[names[k]] for k, a in received.items()}
            )
        for other, record in records.items():  # such as a model that a query returns, or a part of it; or predictions
            if record.keys() == received.keys() or not any(k.isdigit() for k in record):
                local = {k for k in record.keys() & received.keys() if ownership.owner(names[k]) is LOCAL}
                reply.content[other] = ArrayRecord({k: received[k] if k in local else a for k, a in record.items()})
        return trained

    def _load(self, context: Context) -> dict[str, Array]:
        """Take the client's entries out of the context, so that the app sees only its own records."""
        record = context.state.pop(NORMALIZATION_STATE, None)
        if record is None and (path := self._file(context)) is not None:
            states = read_states(path, _owner(context)).get(0, {})
            record = arrays(states.get(NORMALIZATION_STATE, {}))
        return dict(cast(ArrayRecord, record)) if record is not None else {}

    def _save(self, context: Context, own: Mapping[str, Array]) -> None:
        if (path := self._file(context)) is not None:
            state = ArrayRecord(dict(own)).to_torch_state_dict()
            write_states(path, _owner(context), {0: {NORMALIZATION_STATE: state}})

    def _file(self, context: Context) -> Path | None:
        folder, owner = state_folder(context), _owner(context)
        return None if folder is None else folder / f"normalization-run-{owner['run']}-user-{owner['user']}.safetensors"

    def _sync(self, message: Message, context: Context, model: Mapping[str, Array]) -> Message:
        """Reply with the client's next moments in the synchronization of statistics."""
        network, x = self._calibrated(context, model)
        moments = replay(lambda: self.strategy.sync_statistics(network, x), aggregates_from(message.content))
        record = ArrayRecord() if moments is None else arrays(flatten(moments))
        return Message(RecordDict({MOMENTS: record}), reply_to=message)

    def _summarize(self, message: Message, context: Context, model: Mapping[str, Array]) -> Message:
        """Reply with what a population prior needs of this client."""
        record = arrays(summarize_windows(*self._calibrated(context, model)))
        return Message(RecordDict({MOMENTS: record}), reply_to=message)

    def _calibrated(self, context: Context, model: Mapping[str, Array]) -> tuple[nn.Module, Tensor]:
        """The network with some arrays, and the client's unlabeled data."""
        if self.calibration is None:
            raise UserError(
                f"the server asks for statistics, but strategy {self.strategy.name!r} of this client has no data for "
                "them: use one strategy on both sides, and pass calibration=lambda context: batches"
            )
        batches = self.calibration(context)
        x = batches if isinstance(batches, Tensor) else torch.cat(list(batches))
        return build(self.model_fn, {k: torch.from_numpy(a.numpy()) for k, a in model.items()}), x


def _owner(context: Context) -> dict[str, int | str]:
    user = int(context.node_config.get("partition-id", context.node_id))
    return {"version": FORMAT_VERSION, "run": context.run_id, "user": user}


def _is_train(message: Message) -> bool:
    return message.metadata.message_type.partition(".")[0] == "train"


def _is_foreign(message: Message, record: ArrayRecord, known: Entries) -> bool:
    """Whether a query has arrays other than the model's."""
    is_query = message.metadata.message_type.startswith("query")
    return is_query and not any(k in known.ownership.roles or k.isdigit() for k in record)


def _require_no_inner_secure_aggregation(content: RecordDict) -> None:
    """Raise `UserError` if a mod inside this one masks the arrays of replies, so that this mod cannot separate them."""
    config = content.config_records.get("secaggplus_configs")
    if config is not None and "stage" in config:  # the mod of SecAgg+ removes the stage
        raise UserError(
            "SecAgg+ masks the reply before normalization sees it: use mods=[secaggplus_mod, normalization]"
        )


def adaptation(
    model_fn: ModelFn,
    rule: Rule | str,
    prior: Mapping[str, LayerPrior] | None = None,
    *,
    message_types: tuple[str, ...] = ("query.predict",),
    classes: int | None = None,
) -> AdaptationMod:
    """Flower mod with which the statistics of an app that predicts follow the client's stream.

    While the app handles such a message, each call of its network in evaluation mode returns the prediction of
    `fedbn.online.personalized.Personalized`, and the rule then learns from the windows of the call. The state is stored
    in ``Context.state``. It belongs to the weights: after another round of training it starts again.

    Args:
        model_fn: function or class that builds the app's network, by which its network is recognized.
        rule: rule that updates the statistics, such as ``pseudo:n0=64``.
        prior: initial statistics; None: those of the app's network. A prior in the record ``fedbn.prior`` of a message
            replaces it (`fedbn_simulations.flower.calibration.population_prior`).
        message_types: types of the messages in which the app predicts.
        classes: number of classes; None: the width of the last layer.

    Raises:
        UserError: an unknown rule, or one that needs more than the prior has.

    >>> from flwr.clientapp import ClientApp
    >>> from fedbn.models.small_cnn import SmallCNN
    >>> app = ClientApp(mods=[adaptation(lambda: SmallCNN((1, 8, 8), 10), "ema:rate=0.05")])
    """
    resolved = parse_rule(rule) if isinstance(rule, str) else rule
    if prior is not None or resolved.requires != "n0":  # n0 can be in the messages
        _require_field(resolved, prior)
    return AdaptationMod(model_fn, resolved, prior, message_types, classes)


def _require_field(rule: Rule, prior: Mapping[str, LayerPrior] | None) -> None:
    """Raise `UserError` if a rule needs more than a prior has."""
    field = rule.requires
    if field and not (prior and all(getattr(layer, field) is not None for layer in prior.values())):
        sent = f", let the server send it in the record {PRIOR!r}" if field == "n0" else ""
        raise UserError(
            f"rule {rule.name!r} needs {field} of every layer, which running statistics do not have: pass a prior "
            f"from windows (population_prior, source_prior or learn_alpha of fedbn.online){sent}, or use pseudo:n0=64"
        )


@dataclass(frozen=True)
class AdaptationMod:
    """The mod of `adaptation`."""

    model_fn: ModelFn
    rule: Rule
    prior: Mapping[str, LayerPrior] | None
    message_types: tuple[str, ...]
    classes: int | None

    def __call__(self, message: Message, context: Context, call_next: ClientAppCallable) -> Message:
        """Pass a message to the app; predictions follow the stream if the message is one in which the app predicts.

        Raises:
            UserError: the app's network is called with something else than one tensor, or neither the mod nor the
                message has the prior that the rule needs.
        """
        if message.metadata.message_type not in self.message_types:
            return call_next(message, context)
        inner, mod = message, self
        if message.has_content() and PRIOR in message.content:
            mod = replace(self, prior=prior_from(message.content.array_records[PRIOR]))
            inner = copy.copy(message)
            inner.content = RecordDict({k: record for k, record in message.content.items() if k != PRIOR})
        _require_field(mod.rule, mod.prior)
        record = cast(ConfigRecord | None, context.state.pop(ADAPTATION_STATE, None))
        follower = _Follower(mod, record)
        try:
            with register_module_forward_hook(cast(Any, follower)):
                reply = call_next(inner, context)
            if reply.has_content():
                record = follower.record()
            if record is None and reply.has_content():
                warn_once(
                    "adaptation saw no prediction by a network of model_fn: call it as model(x), after model.eval()"
                )
            return reply
        finally:
            if record is not None:
                context.state[ADAPTATION_STATE] = record


class _Follower:
    """Forward hook of all modules that replaces the output of the app's network."""

    def __init__(self, mod: AdaptationMod, record: ConfigRecord | None) -> None:
        self._mod, self._record = mod, record
        template = build(mod.model_fn)
        self._type, self._names = type(template), list(template.state_dict())
        self._thread, self._busy = threading.get_ident(), False
        self._store: dict[str, bytes] = {}
        self._net: Personalized | None = None

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> Tensor | None:
        if self._busy or type(module) is not self._type or threading.get_ident() != self._thread:
            return None
        if list(module.state_dict(keep_vars=True)) != self._names:
            return None
        if module.training:  # the app trains, or has forgotten model.eval()
            warn_once("adaptation does not change calls in training mode: call model.eval() before predictions")
            self._finish()
            return None
        if len(inputs) != 1 or not isinstance(inputs[0], Tensor):
            raise UserError("adaptation needs a network that is called with one tensor of windows, model(x)")
        if not len(inputs[0]):
            return None
        self._busy = True
        try:
            with torch.no_grad():
                return self._predict(module, inputs[0])
        finally:
            self._busy = False

    def _predict(self, module: nn.Module, x: Tensor) -> Tensor:
        net = self._net = self._net or self._personalize(module)
        out = net.predict(x, USER)
        is_classifier = out.shape == (len(x), net.bank.classes)
        net.commit(posterior=out.softmax(1) if is_classifier else None)
        return out

    def _personalize(self, module: nn.Module) -> Personalized:
        mod = self._mod
        net = personalize(module, mod.rule, mod.prior, capacity=1, store=self._store, classes=mod.classes)
        origin = (net.bank.model, net.bank.rule_text)
        if self._record is not None and (self._record["model"], self._record["rule"]) == origin:
            self._store[USER] = cast(bytes, self._record["state"])
        return net

    def _finish(self) -> None:
        """Store the state; the weights can change afterwards."""
        if self._net is not None:
            self._net.flush()
            bank, self._net = self._net.bank, None
            self._record = ConfigRecord({"model": bank.model, "rule": bank.rule_text, "state": self._store.pop(USER)})

    def record(self) -> ConfigRecord | None:
        """The state after the predictions so far; the previous one if there were none."""
        self._finish()
        return self._record

from __future__ import annotations

import logging
import pickle
import threading

import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.clientapp import ClientApp
from torch import nn

from fedbn.errors import UserError
from fedbn.online.personalized import personalize
from fedbn.online.prior import layer_priors, population_prior
from fedbn.online.rules.base import rule
from fedbn.online.stream import follow_rule
from fedbn_clients.mods import ADAPTATION_STATE, NORMALIZATION_STATE, adaptation, normalization
from fedbn_clients.training_mode import warn_once
from tests.flower_apps import data, initial_state, message_app, node_context, send, train_content


class Classifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU())
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.body(x))


def stream(partition=2):
    return data(partition)[0]


def source():
    """A network whose statistics are not the initial ones."""
    net = Classifier()
    net.load_state_dict(initial_state(Classifier))
    net.train()(data(0)[0])
    return net.eval()


def windows(x, state=None):
    arrays = ArrayRecord(source().state_dict() if state is None else state)
    return RecordDict({"arrays": arrays, "windows": ArrayRecord({"x": Array(x.numpy())})})


def predict(app, x, context, state=None):
    reply = send(app, "query.predict", windows(x, state), context)
    return torch.from_numpy(reply.content["predictions"]["0"].numpy())


@pytest.mark.parametrize("text", ["pseudo:n0=8", "ema:rate=0.1", "tbn", "pseudo:diversity=1:guard=true", "source"])
def test_adaptation_equals_the_rule_on_the_stream_across_messages(text):
    app, context, x = message_app([adaptation(Classifier, text)], net=Classifier), node_context(), stream()
    out = torch.cat([predict(app, part, context) for part in x.split(20)])
    expected, net = follow_rule(source(), x, rule(text))
    assert torch.equal(out, expected)
    assert context.state[ADAPTATION_STATE]["model"] == net.bank.model


def test_adaptation_moves_predictions_away_from_the_source_model():
    app, x = message_app([adaptation(Classifier, "pseudo:n0=8")], net=Classifier), stream()
    assert not torch.allclose(predict(app, x, node_context()), source()(x))
    assert torch.equal(
        predict(message_app(net=Classifier), x, node_context()), torch.cat([source()(w) for w in x.split(1)])
    )


def test_clients_follow_their_own_streams():
    app, first, second = (
        message_app([adaptation(Classifier, "ema:rate=0.3")], net=Classifier),
        *map(node_context, (0, 1)),
    )
    predict(app, stream(2), first)
    assert torch.equal(predict(app, stream(1), second), follow_rule(source(), stream(1), rule("ema:rate=0.3"))[0])


def test_state_belongs_to_weights_and_rule():
    context, x = node_context(), stream()
    app = message_app([adaptation(Classifier, "ema:rate=0.1")], net=Classifier)
    predict(app, x, context)
    changed = {k: v * 1.5 if v.is_floating_point() else v for k, v in source().state_dict().items()}
    net = Classifier()
    net.load_state_dict(changed)
    assert torch.equal(predict(app, x, context, changed), follow_rule(net.eval(), x, rule("ema:rate=0.1"))[0])
    other = message_app([adaptation(Classifier, "ema:rate=0.2")], net=Classifier)
    assert torch.equal(predict(other, x, context, changed), follow_rule(net.eval(), x, rule("ema:rate=0.2"))[0])


def test_adaptation_starts_from_own_entries_of_normalization():
    mods = [normalization(Classifier, "fedbn"), adaptation(Classifier, "ema:rate=0.1")]
    app, context = message_app(mods, net=Classifier), node_context(1)

    @app.train("local")
    def train(message, context):
        net = Classifier()
        net.load_state_dict(message.content["arrays"].to_torch_state_dict())
        net.train()(stream(1))
        return Message(RecordDict({"arrays": ArrayRecord(net.state_dict())}), reply_to=message)

    send(app, "train.local", train_content(source().state_dict()), context)
    net = source()
    net.train()(stream(1))
    assert torch.equal(predict(app, stream(), context), follow_rule(net.eval(), stream(), rule("ema:rate=0.1"))[0])
    assert set(context.state) == {NORMALIZATION_STATE, ADAPTATION_STATE}


def test_networks_in_other_threads_are_not_adapted():
    app, net, x = ClientApp(mods=[adaptation(Classifier, "tbn")]), source(), stream()
    outputs = []

    @app.query("predict")
    def answer(message, context):
        net(x)
        thread = threading.Thread(target=lambda: outputs.append(net(x)))
        thread.start()
        thread.join()
        return Message(RecordDict(), reply_to=message)

    send(app, "query.predict", RecordDict(), node_context())
    assert torch.equal(outputs[0], source()(x))


def test_prior_of_a_population_and_pickling():
    prior = population_prior(source(), [stream(0), stream(1), stream(2)])
    mod = pickle.loads(pickle.dumps(adaptation(Classifier, "population", prior)))  # noqa: S301
    out = predict(message_app([mod], net=Classifier), stream(), node_context())
    assert torch.equal(out, follow_rule(source(), stream(), rule("population"), prior)[0])
    with pytest.raises(UserError, match="'population' needs n0 of every layer.*or use pseudo:n0=64"):
        adaptation(Classifier, "population", layer_priors(source()))
    with pytest.raises(UserError, match="'ttn' needs alpha of every layer"):
        adaptation(Classifier, "ttn")
    without = message_app([adaptation(Classifier, "population")], net=Classifier)
    with pytest.raises(UserError, match=r"needs n0 .*let the server send it in the record 'fedbn.prior', or use"):
        predict(without, stream(), node_context())


def test_regression_and_inference_mode():
    app = ClientApp(mods=[adaptation(Regressor, "pseudo:n0=8")])

    @app.query("predict")
    def answer(message, context):
        model = Regressor().eval()
        with torch.inference_mode():
            return Message(RecordDict({"predictions": ArrayRecord([model(stream()).numpy()])}), reply_to=message)

    context = node_context()
    outputs = [predict(app, stream(), context) for _ in range(2)]
    assert outputs[0].shape == (48,)
    assert not torch.equal(*outputs)


class Regressor(nn.Module):
    """One number per window, without an axis of outputs."""

    def __init__(self):
        super().__init__()
        self.norm, self.last = nn.BatchNorm1d(4), nn.Linear(4, 1)
        nn.init.ones_(self.last.weight)

    def forward(self, x):
        return self.last(self.norm(x)).squeeze(1)


def test_other_messages_and_networks_are_not_adapted():
    app = message_app([adaptation(Classifier, "tbn")], net=Classifier)

    @app.query("other")
    def other(message, context):
        return Message(
            RecordDict({"predictions": ArrayRecord([source()(stream()).detach().numpy()])}), reply_to=message
        )

    reply = send(app, "query.other", windows(stream()), node_context())
    assert torch.equal(torch.from_numpy(reply.content["predictions"]["0"].numpy()), source()(stream()).detach())
    sequence = ClientApp(mods=[adaptation(lambda: nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 2)), "tbn")])

    @sequence.query("predict")
    def answer(message, context):
        model = nn.Sequential(nn.Sequential(nn.Linear(4, 4)), nn.Linear(4, 2)).eval()
        return Message(RecordDict({"same": ConfigRecord({"n": len(model(stream()))})}), reply_to=message)

    context = node_context()
    assert send(sequence, "query.predict", windows(stream()), context).has_content()
    assert ADAPTATION_STATE not in context.state


def test_state_is_restored_after_an_error():
    context, x = node_context(), stream()
    predict(message_app([adaptation(Classifier, "ema:rate=0.1")], net=Classifier), x, context)
    before = dict(context.state[ADAPTATION_STATE])
    broken, net = ClientApp(mods=[adaptation(Classifier, "ema:rate=0.1")]), source()

    @broken.query("predict")
    def answer(message, context):
        assert not context.state
        net(x)
        raise RuntimeError("no camera")

    with pytest.raises(RuntimeError, match="no camera"):
        send(broken, "query.predict", windows(x), context)
    assert dict(context.state[ADAPTATION_STATE]) == before
    assert torch.equal(net(x), source()(x)), "the hook is removed"


def test_calls_in_training_mode_are_not_adapted(caplog):
    app, x = ClientApp(mods=[adaptation(Classifier, "tbn")]), stream()

    @app.query("predict")
    def answer(message, context):
        net = source()
        outputs = [net.eval()(x), net.train()(x), net.eval()(x)]
        return Message(
            RecordDict({"predictions": ArrayRecord([o.detach().numpy() for o in outputs])}), reply_to=message
        )

    warn_once.cache_clear()
    outputs = send(app, "query.predict", windows(x), node_context()).content["predictions"].to_numpy_ndarrays()
    net, expected = source(), []
    expected.append(follow_batch(net, x))
    expected.append(net.train()(x).detach())
    expected.append(follow_batch(net.eval(), x))
    assert all(torch.equal(torch.from_numpy(a), b) for a, b in zip(outputs, expected, strict=True))
    assert ["call model.eval()" in record.message for record in caplog.records] == [True]


def follow_batch(net, x):
    return personalize(net, "tbn", capacity=1)(x, user="any")


def test_adaptation_errors_name_mistake_and_fix():
    app, x = ClientApp(mods=[adaptation(Classifier, "ema")]), stream()

    net = source()

    @app.query("predict")
    def answer(message, context):
        net(x=x)

    with pytest.raises(UserError, match="called with one tensor"):
        send(app, "query.predict", RecordDict(), node_context())
    with pytest.raises(UserError, match="Did you mean 'pseudo'"):
        adaptation(Classifier, "psuedo")


def test_app_that_does_not_call_its_network_is_reported(caplog):
    app, net = ClientApp(mods=[adaptation(Classifier, "ema")]), source()

    @app.query("predict")
    def answer(message, context):
        net.forward(stream())
        return Message(RecordDict(), reply_to=message)

    warn_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        send(app, "query.predict", windows(stream()), node_context())
    (record,) = caplog.records
    assert "call it as model(x)" in record.message

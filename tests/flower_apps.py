"""Flower apps in the shapes of Flower's templates, with their own loops, models and data; they do not know fedbn."""

from __future__ import annotations

import threading
from collections import OrderedDict

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.client import NumPyClient
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp
from torch import nn

from fedbn_simulations.engines.grid import InProcessGrid
from fedbn_simulations.flower.compat import task_identity

SERVER_NODE = 1
FEATURES = 4


class Net(nn.Module):
    """A regressor whose normalization layer has no 'bn' in its name."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(FEATURES, 6, bias=False)  # Adam would amplify rounding errors of a bias before BN
        self.scaler = nn.BatchNorm1d(6)
        self.last = nn.Linear(6, 1)

    def forward(self, x):
        return self.last(torch.relu(self.scaler(self.first(x))))


def data(partition):
    """Examples with features that are scaled and shifted differently at each client."""
    generator = torch.Generator().manual_seed(partition)
    x = torch.randn(48, FEATURES, generator=generator)
    y = (x[:, :1] - 0.5 * x[:, 1:2]).abs()
    return x * (1 + 3 * partition) + 4 * partition, y


def local_training(net, x, y, epochs=2):
    """The app's own loop: Adam and a regression loss."""
    torch.manual_seed(0)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.02)
    net.train()
    for _ in range(epochs):
        for rows in torch.randperm(len(x)).split(16):
            optimizer.zero_grad()
            nn.functional.mse_loss(net(x[rows]), y[rows]).backward()
            optimizer.step()


@torch.no_grad()
def local_error(net, x, y):
    net.eval()
    return float(nn.functional.mse_loss(net(x), y))


def message_app(mods=(), train_mods=(), net=Net):
    """Like Flower's quickstart-pytorch: functions with messages."""
    app = ClientApp(mods=list(mods))

    @app.train(mods=list(train_mods))
    def train(message: Message, context: Context):
        model, partition = net(), context.node_config["partition-id"]
        model.load_state_dict(message.content["arrays"].to_torch_state_dict())
        x, y = data(partition)
        local_training(model, x, y)
        metrics = MetricRecord({"train_loss": local_error(model, x, y), "num-examples": len(x)})
        return Message(RecordDict({"arrays": ArrayRecord(model.state_dict()), "metrics": metrics}), reply_to=message)

    @app.evaluate()
    def evaluate(message: Message, context: Context):
        model = net()
        model.load_state_dict(message.content["arrays"].to_torch_state_dict())
        x, y = data(context.node_config["partition-id"])
        metrics = MetricRecord({"error": local_error(model, x, y), "num-examples": len(x)})
        return Message(RecordDict({"metrics": metrics}), reply_to=message)

    @app.query("predict")
    def predict(message: Message, context: Context):
        model = net()
        model.load_state_dict(message.content["arrays"].to_torch_state_dict())
        model.eval()
        x = torch.from_numpy(message.content["windows"]["x"].numpy())
        with torch.no_grad():
            out = torch.cat([model(window) for window in x.split(1)])
        return Message(RecordDict({"predictions": ArrayRecord([out.numpy()])}), reply_to=message)

    return app


class Client(NumPyClient):
    """Like Flower's examples with a NumPyClient: arrays without names."""

    def __init__(self, partition, only_parameters):
        self.net, (self.x, self.y) = Net(), data(partition)
        self.only_parameters = only_parameters

    def entries(self):
        return dict(self.net.named_parameters()) if self.only_parameters else self.net.state_dict()

    def get_parameters(self, config):
        return [value.detach().numpy() for value in self.entries().values()]

    def set_parameters(self, parameters):
        values = zip(self.entries(), map(torch.tensor, parameters), strict=True)
        self.net.load_state_dict(OrderedDict(values), strict=not self.only_parameters)

    def fit(self, parameters, config):
        self.set_parameters(parameters)
        local_training(self.net, self.x, self.y)
        return self.get_parameters({}), len(self.x), {}

    def evaluate(self, parameters, config):
        self.set_parameters(parameters)
        error = local_error(self.net, self.x, self.y)
        return error, len(self.x), {"error": error}


def numpy_client_app(mods=(), only_parameters=False):
    def client_fn(context: Context):
        return Client(context.node_config["partition-id"], only_parameters).to_client()

    return ClientApp(client_fn, mods=list(mods))


class Trainer:
    """A trainer object that owns the loop, as in Flower's example with Lightning."""

    def __init__(self, epochs):
        self.epochs = epochs

    def fit(self, module, batches):
        optimizer = module.configure_optimizers()
        module.train()
        for _ in range(self.epochs):
            for batch in batches:
                optimizer.zero_grad()
                module.training_step(batch).backward()
                optimizer.step()

    @torch.no_grad()
    def test(self, module, batches):
        module.eval()
        return sum(float(module.training_step(batch)) for batch in batches) / len(batches)


class Module(nn.Module):
    """A module that holds the network, so that all names have a prefix."""

    def __init__(self):
        super().__init__()
        self.model = Net()

    def training_step(self, batch):
        x, y = batch
        return nn.functional.mse_loss(self.model(x), y)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.02)


def trainer_app(mods=()):
    app = ClientApp(mods=list(mods))

    def load(message, context):
        module = Module()
        module.load_state_dict(message.content["arrays"].to_torch_state_dict())
        x, y = data(context.node_config["partition-id"])
        return module, list(zip(x.split(16), y.split(16), strict=True))

    @app.train()
    def train(message: Message, context: Context):
        module, batches = load(message, context)
        Trainer(epochs=2).fit(module, batches)
        content = {"arrays": ArrayRecord(module.state_dict()), "metrics": MetricRecord({"num-examples": 48})}
        return Message(RecordDict(content), reply_to=message)

    @app.evaluate()
    def evaluate(message: Message, context: Context):
        error = Trainer(epochs=2).test(*load(message, context))
        return Message(RecordDict({"metrics": MetricRecord({"error": error, "num-examples": 48})}), reply_to=message)

    return app


def sklearn_app(mods=()):
    """Like Flower's example with scikit-learn: coefficients without names, no torch."""
    from sklearn.linear_model import SGDRegressor

    app = ClientApp(mods=list(mods))

    def load(message, context):
        x, y = data(context.node_config["partition-id"])
        model = SGDRegressor(random_state=0, max_iter=1, tol=None, warm_start=True, eta0=0.001)
        model.coef_, model.intercept_ = message.content["arrays"].to_numpy_ndarrays()
        model.coef_, model.intercept_ = model.coef_.copy(), model.intercept_.copy()
        return model, x.numpy(), y[:, 0].numpy()

    @app.train()
    def train(message: Message, context: Context):
        model, x, y = load(message, context)
        model.partial_fit(x, y)
        arrays = ArrayRecord([np.asarray(model.coef_), np.asarray(model.intercept_)])
        content = {"arrays": arrays, "metrics": MetricRecord({"num-examples": len(x)})}
        return Message(RecordDict(content), reply_to=message)

    @app.evaluate()
    def evaluate(message: Message, context: Context):
        model, x, y = load(message, context)
        error = float(np.mean((model.predict(x) - y) ** 2))
        return Message(
            RecordDict({"metrics": MetricRecord({"error": error, "num-examples": len(x)})}), reply_to=message
        )

    return app


def initial_state(net=Net):
    torch.manual_seed(7)
    return net().state_dict()


def server_app(strategy, rounds=3, arrays=None, **options):
    """A ServerApp that runs a strategy; the result is its attribute ``result``."""
    app = ServerApp()

    @app.main()
    def main(grid, context):
        initial = ArrayRecord(initial_state()) if arrays is None else arrays
        app.result = strategy.start(grid, initial, num_rounds=rounds, **options)

    return app


class LockedGrid(InProcessGrid):
    """A grid for servers of Flower's former interface, which push messages from several threads."""

    lock = threading.RLock()

    def push_messages(self, messages):
        with self.lock:
            return super().push_messages(messages)


def simulate(server, client, nodes=3, run_config=None):
    """Run two apps in this process; returns the grid, which has the contexts of the nodes."""
    grid = LockedGrid(client, nodes, dict(run_config or {}))
    with task_identity(1):
        server(grid=grid, context=Context(1, SERVER_NODE, {}, RecordDict(), dict(run_config or {})))
    return grid


def send(client, message_type, content, context):
    """Send one message to a ClientApp."""
    with task_identity(1):
        message = Message(content, dst_node_id=context.node_id, message_type=message_type)
        message.metadata.__dict__["_message_id"] = "1"
        return client(message, context)


def node_context(partition=0, **node_config):
    return Context(1, 1000 + partition, {"partition-id": partition, **node_config}, RecordDict(), {})


def train_content(state=None, **config):
    state = initial_state() if state is None else state
    record = state if isinstance(state, ArrayRecord) else ArrayRecord(state)
    return RecordDict({"arrays": record, "config": ConfigRecord({"lr": 0.1, **config})})

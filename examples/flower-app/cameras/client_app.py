"""The ClientApp. Only the line with `mods` differs from an app that shares everything."""

from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from cameras.task import Net, load_data
from cameras.task import test as test_fn
from cameras.task import train as train_fn
from fedbn_clients.mods import normalization

app = ClientApp(mods=[normalization(Net, "fedbn")])


def _setup(message, context):
    net = Net()
    net.load_state_dict(message.content["arrays"].to_torch_state_dict())
    node, run = context.node_config, context.run_config
    return net, *load_data(node["partition-id"], node["num-partitions"], run["batch-size"])


@app.train()
def train(message: Message, context: Context):
    net, loader, _ = _setup(message, context)
    loss = train_fn(net, loader, context.run_config["local-epochs"], context.run_config["learning-rate"])
    metrics = MetricRecord({"train_loss": loss, "num-examples": len(loader.dataset)})
    return Message(RecordDict({"arrays": ArrayRecord(net.state_dict()), "metrics": metrics}), reply_to=message)


@app.evaluate()
def evaluate(message: Message, context: Context):
    net, _, loader = _setup(message, context)
    metrics = MetricRecord({"accuracy": test_fn(net, loader), "num-examples": len(loader.dataset)})
    return Message(RecordDict({"metrics": metrics}), reply_to=message)

"""ClientApp in the shape of Flower's quickstart."""

from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from torch.utils.data import DataLoader

from lenet.task import Net, load_data
from lenet.task import test as test_fn
from lenet.task import train as train_fn

app = ClientApp()


def start(msg: Message, context: Context) -> tuple[Net, DataLoader, DataLoader]:
    """The received model and the client's data."""
    net = Net()
    net.load_state_dict(msg.content["arrays"].to_torch_state_dict())
    config = context.run_config
    return net, *load_data(context.node_config["partition-id"], config["examples"], config["batch-size"])


@app.train()
def train(msg: Message, context: Context) -> Message:
    """Train the model on local data."""
    net, loader, _ = start(msg, context)
    loss = train_fn(net, loader, context.run_config["learning-rate"])
    metrics = MetricRecord({"train_loss": loss, "num-examples": len(loader.dataset)})
    content = RecordDict({"arrays": ArrayRecord(net.state_dict()), "metrics": metrics})
    return Message(content=content, reply_to=msg)


@app.evaluate()
def evaluate(msg: Message, context: Context) -> Message:
    """Evaluate the model on local data."""
    net, _, loader = start(msg, context)
    metrics = MetricRecord({"eval_acc": test_fn(net, loader), "num-examples": len(loader.dataset)})
    return Message(content=RecordDict({"metrics": metrics}), reply_to=msg)

import torch
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from messages.task import Net, load_data
from messages.task import test as test_fn
from messages.task import train as train_fn

app = ClientApp()


def start(msg, context):
    partition = context.node_config["partition-id"]
    if context.run_config["seeded"]:
        torch.manual_seed(100 * msg.content["config"]["server-round"] + partition)
    net = Net()
    net.load_state_dict(msg.content["arrays"].to_torch_state_dict())
    return partition, net


@app.train()
def train(msg, context):
    partition, net = start(msg, context)
    trainset, _ = load_data(partition)
    loss = train_fn(net, trainset, context.run_config["learning-rate"])
    metrics = {"train_loss": loss, "num-examples": len(trainset[1]), "partition": partition}
    content = RecordDict({"arrays": ArrayRecord(net.state_dict()), "metrics": MetricRecord(metrics)})
    return Message(content=content, reply_to=msg)


@app.evaluate()
def evaluate(msg, context):
    partition, net = start(msg, context)
    _, testset = load_data(partition)
    metrics = {"eval_mse": test_fn(net, testset), "num-examples": len(testset[1])}
    return Message(content=RecordDict({"metrics": MetricRecord(metrics)}), reply_to=msg)

from flwr.client import NumPyClient
from flwr.clientapp import ClientApp

from numpyclient.task import evaluate, fit, get_weights, load_data, make_net, set_weights


class FlowerClient(NumPyClient):
    def __init__(self, partition):
        self.net = make_net()
        self.x, self.y = load_data(partition)

    def fit(self, parameters, config):
        set_weights(self.net, parameters)
        fit(self.net, self.x[:64], self.y[:64])
        return get_weights(self.net), 64, {}

    def evaluate(self, parameters, config):
        set_weights(self.net, parameters)
        loss, accuracy = evaluate(self.net, self.x[64:], self.y[64:])
        return loss, 32, {"accuracy": accuracy}


def client_fn(context):
    return FlowerClient(context.node_config["partition-id"]).to_client()


app = ClientApp(client_fn=client_fn)

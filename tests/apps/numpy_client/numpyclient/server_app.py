from flwr.common import ndarrays_to_parameters
from flwr.server import ServerAppComponents, ServerConfig
from flwr.server.strategy import FedAvg
from flwr.serverapp import ServerApp

from numpyclient.task import get_weights, make_net


def mean_accuracy(metrics):
    return {"accuracy": sum(n * m["accuracy"] for n, m in metrics) / sum(n for n, _ in metrics)}


def server_fn(context):
    strategy = FedAvg(
        initial_parameters=ndarrays_to_parameters(get_weights(make_net())),
        evaluate_metrics_aggregation_fn=mean_accuracy,
    )
    config = ServerConfig(num_rounds=context.run_config["num-server-rounds"])
    return ServerAppComponents(strategy=strategy, config=config)


app = ServerApp(server_fn=server_fn)

import warnings

from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from sklearn.metrics import log_loss

from task import load_data, make_model

app = ClientApp()


def start(msg, context):
    model = make_model(context)
    model.coef_, model.intercept_ = msg.content["arrays"].to_numpy_ndarrays()
    return model, *load_data(context.node_config["partition-id"])


@app.train()
def train(msg, context):
    model, x, y = start(msg, context)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a few iterations do not converge
        model.fit(x[:60], y[:60])
    metrics = MetricRecord({"train_logloss": log_loss(y[:60], model.predict_proba(x[:60])), "num-examples": 60})
    arrays = ArrayRecord([model.coef_, model.intercept_])
    return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=msg)


@app.evaluate()
def evaluate(msg, context):
    model, x, y = start(msg, context)
    metrics = MetricRecord({"accuracy": model.score(x[60:], y[60:]), "num-examples": 20})
    return Message(RecordDict({"metrics": metrics}), reply_to=msg)

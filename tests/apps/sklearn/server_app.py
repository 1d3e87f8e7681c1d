from flwr.app import ArrayRecord
from flwr.serverapp import ServerApp
from flwr.serverapp.strategy import FedAvg

from task import make_model

app = ServerApp()


@app.main()
def main(grid, context):
    model = make_model(context)
    result = FedAvg().start(grid=grid, initial_arrays=ArrayRecord([model.coef_, model.intercept_]), num_rounds=2)
    print("coefficients", result.arrays.to_numpy_ndarrays()[0].round(3).tolist())

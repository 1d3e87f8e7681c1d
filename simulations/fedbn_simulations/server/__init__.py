"""Server side of the Flower app: rounds, nodes, validation of replies, server optimizers."""

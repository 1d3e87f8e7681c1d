"""Federated and domain-adaptive batch normalisation: the library. It imports neither Flower nor Ray."""

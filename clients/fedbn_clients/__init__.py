"""Client side: the Flower ClientApp and its per-user state."""

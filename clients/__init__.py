"""What runs at a user: the Flower ClientApp and its per-user state."""

"""Studies of online adaptation to unseen users."""

"""Optimizers of the clients and schedules of their learning rate, as small plug-ins."""

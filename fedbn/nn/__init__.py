"""Tools for any torch model: roles of state entries, conversion of layers, hooks, inference."""

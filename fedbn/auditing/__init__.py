"""Audit of a model: roles, owners and bytes of its entries, and lints for federated normalization."""

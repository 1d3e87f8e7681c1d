"""Attacks on messages and states: what a federation leaks."""

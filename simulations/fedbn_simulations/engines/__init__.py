"""Engines that execute a run: reference loop, in-process grid, Ray, deployment."""

"""Papers: published numbers next to ours."""

from fedbn_simulations.papers.paper import Paper, paper, papers

__all__ = ["Paper", "paper", "papers"]

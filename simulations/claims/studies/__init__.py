"""Studies: one paper per file. A study holds functions that train one arm with one seed, and ``CLAIMS``."""

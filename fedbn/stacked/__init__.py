"""Stacked execution: many clients train and are evaluated as one tensor program.

`program` traces a model and builds its stacked version, in which every parameter has a leading client axis. `fit`
trains a stack with the shuffles, dropout masks and learning rates of its clients. `cohort` runs whole client rounds,
and `evaluate` scores users. `executors` chooses between stacked and sequential execution and distributes the work over
the cores. The results do not change: in float64 a stacked round equals `fedbn.federation.client.client_round` up to
rounding.
"""

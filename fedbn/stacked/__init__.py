"""Many clients as one tensor program: the same steps that each would take alone, side by side.

`program` reads a model and gives its stacked twin, in which every parameter has a leading client axis; `fit` trains
a stack with the shuffles, dropout masks and learning rates of its clients; `cohort` does whole client rounds with it,
`evaluate` scores users; `executors` chooses between that and one client after the other, and uses the cores. What a
client
computes does not change: in float64 a stacked round equals `fedbn.federation.client.client_round` to rounding.
"""

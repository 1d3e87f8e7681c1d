"""Normalization methods, one module per paper.

A module that defines ``convert`` is a kind of normalization for `fedbn.nn.conversion.convert`.

Every layer with running statistics stores them as ``running_mean`` and ``running_var``, the variance used in
evaluation. A method that averages something else (standard deviations, second moments) computes it from these two. So
any layer can be recalibrated, updated online, shared and converted back to BN in the same way.
"""

"""Normalizers: one file a paper. A file with a function ``convert`` is a kind that `fedbn.nn.conversion.convert` knows.

Every layer with running statistics keeps them as ``running_mean`` and ``running_var``, the variance that evaluation
normalizes by. A method that averages something else (standard deviations, second moments) does so on a function of
these two, so that any layer is recalibrated, followed online, shared and turned back into BN like any other.
"""

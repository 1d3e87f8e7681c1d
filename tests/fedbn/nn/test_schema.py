from __future__ import annotations

import math

import pytest
import torch

from fedbn.nn import schema as schemas
from fedbn.nn.roles import Role
from fedbn.nn.schema import (
    MAX_JOINED,
    Kind,
    Limits,
    TensorSpec,
    check_names,
    check_tensors,
    check_values,
    entries_schema,
    moments_schema,
    parameter_norm,
)


def spec_of(value, kind):
    return TensorSpec(value.dtype, tuple(value.shape), kind)


def problem(value, kind, **limits):
    return check_values({"x": value}, {"x": spec_of(value, kind)}, Limits(**limits))


@pytest.mark.parametrize(
    ("kind", "valid", "invalid"),
    [
        (Kind.PARAMETER, (-1e15, 0.0, 1e15), (-2e15, 3e38)),
        (Kind.VALUE, (-1e15, 1e15), (2e15,)),
        (Kind.NONNEGATIVE, (0.0, 1e15), (-1e-6, 2e15)),
        (Kind.MEAN, (-1e15, 1e15), (2e15,)),
        (Kind.VARIANCE, (0.0, 1e30), (-1e-6, 2e30)),
        (Kind.SUM, (0.0, 1e42), (-1.0, 2e42)),
        (Kind.COUNT, (1.0, 1e12), (0.0, 0.5, 2e12)),
        (Kind.SHARE, (0.0, 1.0), (-0.1, 1.1)),
    ],
)
@pytest.mark.parametrize("size", [1, MAX_JOINED + 1])
def test_check_values_bounds_every_kind(kind, valid, invalid, size):
    for value in valid:
        assert problem(torch.full((size,), value, dtype=torch.float64), kind) is None
    for value in (*invalid, math.nan, math.inf, -math.inf):
        x = torch.full((size,), valid[-1], dtype=torch.float64)
        x[size // 2] = value
        expected = r"x, expected" if math.isfinite(value) else "NaN or Inf in x"
        assert expected in problem(x, kind)


def test_check_values_names_the_tensor_among_others():
    state = {name: torch.ones(3) for name in "abcd"} | {"big": torch.ones(MAX_JOINED + 1), "empty": torch.ones(0)}
    schema = {name: spec_of(value, Kind.VARIANCE) for name, value in state.items()}
    assert check_values(state, schema) is None
    for name in ("c", "big"):
        assert f"-2 in {name}," in check_values(state | {name: state[name] * -2}, schema)


def test_check_values_of_complex_and_masked_tensors():
    assert problem(torch.tensor([1 + 1j]), Kind.PARAMETER) is None
    assert problem(torch.tensor([complex(1, math.nan)]), Kind.PARAMETER) == "NaN or Inf in x"
    assert problem(torch.tensor([2**63 - 1, -(2**63)]), Kind.WORD) is None


def test_limits_bound_statistics():
    assert problem(torch.tensor([11.0]), Kind.MEAN, statistic=10.0) == "11 in x, expected -10 to 10"
    assert problem(torch.tensor([99.0]), Kind.VARIANCE, statistic=10.0) is None
    assert problem(torch.tensor([101.0]), Kind.VARIANCE, statistic=10.0) == "101 in x, expected 0 to 100"
    assert problem(torch.tensor([101.0]), Kind.PARAMETER, statistic=10.0) is None


def test_entries_schema_finds_kinds():
    names = [
        "running_mean",
        "running_var",
        "domain_var",
        "running_size",
        "steps",
        "running_grad_mean",
        "running_logits",
    ]
    state = {f"layer.{name}": torch.zeros(2) for name in names}
    kinds = [spec.kind for spec in entries_schema(state, dict.fromkeys(state, Role.STATISTICS)).values()]
    same_kind = [Kind.NONNEGATIVE] * 2 + [Kind.VALUE] * 2
    assert kinds == [Kind.MEAN, Kind.VARIANCE, Kind.VARIANCE, *same_kind]
    assert (
        entries_schema({"running_var": torch.zeros(2)}, {"running_var": Role.BODY})["running_var"].kind
        is Kind.PARAMETER
    )


def test_moments_of_variances_are_not_negative():
    schema = moments_schema({"a|mean": 2, "a|var": 3})
    assert (schema["a|mean|mean"].kind, schema["a|var|mean"].kind) == (Kind.MEAN, Kind.VARIANCE)
    assert (schema["a|var|m2"].shape, schema["a|var|n"].shape) == ((3,), ())


def test_check_names_allows_absent_optional_tensors():
    schema = {"a": TensorSpec(torch.float32, ()), "b": TensorSpec(torch.float32, (), required=False)}
    assert check_names(["a"], schema) == check_names(["a", "b"], schema) == []
    assert check_names(["b", "z"], schema) == ["a", "z"]


def test_check_tensors_compares_dtype_and_shape():
    schema = {"a": TensorSpec(torch.float32, (2, 1))}
    assert check_tensors({"a": torch.zeros(2, 1)}, schema) is None
    for wrong in (torch.zeros(2, 1).double(), torch.zeros(2), torch.zeros(1, 2)):
        assert "expected torch.float32 [2, 1]" in check_tensors({"a": wrong}, schema)


def test_parameter_norm_ignores_statistics():
    schema = {"w": TensorSpec(torch.float32, (2,)), "m": TensorSpec(torch.float32, (2,), Kind.MEAN)}
    state = {"w": torch.tensor([3.0, 4.0]), "m": torch.full((2,), 100.0)}
    assert parameter_norm(state, schema) == 5.0
    assert parameter_norm(state, schema, {k: v + 1 for k, v in state.items()}) == pytest.approx(math.sqrt(2))


def test_largest_values_have_finite_squares():
    assert torch.isfinite(torch.tensor(schemas.MAX_VALUE) ** 2)

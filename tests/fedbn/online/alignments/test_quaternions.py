import math

import pytest
import torch

from fedbn.online.alignments import quaternions as so3


@pytest.fixture
def vectors():
    draw = torch.Generator().manual_seed(0)
    return torch.randn(50, 3, generator=draw, dtype=torch.float64)


def test_from_vector_is_the_matrix_exponential(vectors):
    cross = torch.einsum("iab,na->nib", so3.CROSS, vectors)
    assert torch.allclose(so3.to_matrix(so3.from_vector(vectors)), torch.linalg.matrix_exp(cross))


def test_cross_is_the_cross_product(vectors):
    product = torch.einsum("iab,na,nb->ni", so3.CROSS, vectors, vectors.roll(1, 0))
    assert torch.allclose(product, torch.linalg.cross(vectors, vectors.roll(1, 0)))


def test_multiply_is_the_product_of_matrices(vectors):
    p, q = so3.from_vector(vectors), so3.from_vector(vectors.roll(1, 0))
    assert torch.allclose(so3.to_matrix(so3.multiply(p, q)), so3.to_matrix(p) @ so3.to_matrix(q))


@pytest.mark.parametrize("angle", [0.0, 1e-9, 1e-4, 1.0, 3.0, math.pi - 1e-9, math.pi])
def test_to_vector_inverts_from_vector_at_every_angle(vectors, angle):
    short = torch.nn.functional.normalize(vectors, dim=1) * angle
    back = so3.to_vector(so3.from_vector(short))
    # A rotation by pi about an axis is one about its opposite.
    assert torch.minimum((back - short).norm(dim=1), (back + short).norm(dim=1)).max() < 1e-7
    if angle < 3.1:
        assert torch.allclose(back, short, atol=1e-12)


def test_to_vector_takes_the_shorter_way():
    assert so3.to_vector(so3.from_vector(torch.tensor([0.0, 0.0, 4.0]))).norm() < math.pi


def test_from_matrix_inverts_to_matrix(vectors):
    for q in so3.from_vector(vectors):
        back = so3.from_matrix(so3.to_matrix(q))
        assert min((back - q).norm(), (back + q).norm()) < 1e-9


def test_identity_matrix_is_exact():
    assert torch.equal(so3.to_matrix(torch.tensor([1.0, 0, 0, 0])), torch.eye(3))

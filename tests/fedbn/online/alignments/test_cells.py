import numpy as np

from fedbn.online.alignments.cells import insert, reduce

ONES = np.ones(2)


def draw(*shape):
    return np.random.default_rng(0).standard_normal(shape)


def stored(z, size, scale=ONES):
    cells = np.zeros((1, size)), np.zeros((1, size, z.shape[1]))
    for row in z:
        cells = insert(cells, row[None], np.ones(1), scale)
    return cells


def test_cells_hold_a_short_stream_exactly():
    z = draw(7, 2)
    n, mean = stored(z, 8)
    assert n.sum() == 7
    assert set(map(tuple, mean[n > 0].tolist())) == set(map(tuple, z.tolist()))


def test_cells_conserve_weight_and_mean_of_a_long_stream():
    z = draw(200, 2)
    n, mean = stored(z, 8)
    assert n.shape == (1, 8)
    assert float(n.sum()) == 200
    assert np.allclose((n[..., None] * mean).sum((0, 1)), z.sum(0))


def test_cells_keep_distant_windows_apart():
    z = np.array([[0.0, 0], [9, 9], [0.1, 0], [9, 9.1], [0, 0.1], [-9, 9]])
    n, mean = stored(z, 3)
    assert sorted(n[0].tolist()) == [1, 2, 3]
    assert sorted(mean[0].round().tolist()) == [[-9, 9], [0, 0], [9, 9]]


def test_cells_measure_distances_in_units_of_the_scale():
    z = np.array([[0.0, 0], [1, 0], [0, 5]])
    by_first, by_second = stored(z, 2, np.array([100.0, 1])), stored(z, 2, np.array([1.0, 100]))
    assert by_first[1][0].tolist() != by_second[1][0].tolist()
    assert [row[1] for row in by_first[1][0].tolist() if row[1]] == [5.0]


def test_cells_do_not_depend_on_other_users():
    z = draw(30, 3, 2)
    together = np.zeros((3, 4)), np.zeros((3, 4, 2))
    for rows in z:
        together = insert(together, rows, np.ones(3), ONES)
    alone = stored(z[:, 1], 4)
    assert np.array_equal(together[0][1], alone[0][0])
    assert np.array_equal(together[1][1], alone[1][0])


def test_reduce_adds_free_cells_or_merges():
    n, mean = np.ones((1, 3)), np.array([[[0.0, 0], [0, 1], [5, 5]]])
    assert reduce((n, mean), 5, ONES)[0].tolist() == [[1, 1, 1, 0, 0]]
    n, mean = reduce((n, mean), 2, ONES)
    assert sorted(zip(n[0].tolist(), mean[0].tolist(), strict=True)) == [(1, [5, 5]), (2, [0, 0.5])]

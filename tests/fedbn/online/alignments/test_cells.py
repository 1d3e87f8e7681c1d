import torch

from fedbn.online.alignments.cells import insert, reduce

ONES = torch.ones(2)


def stored(z, size, scale=ONES):
    cells = torch.zeros(1, size), torch.zeros(1, size, z.shape[1])
    for row in z:
        cells = insert(cells, row[None], torch.ones(1), scale)
    return cells


def test_cells_hold_a_short_stream_exactly():
    z = torch.randn(7, 2, generator=torch.Generator().manual_seed(0))
    n, mean = stored(z, 8)
    assert n.sum() == 7
    rows = mean[0][n[0] > 0]
    assert {tuple(r) for r in rows.tolist()} == {tuple(r) for r in z.tolist()}


def test_cells_conserve_weight_and_mean_of_a_long_stream():
    z = torch.randn(200, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    cells = torch.zeros(1, 8, dtype=torch.float64), torch.zeros(1, 8, 2, dtype=torch.float64)
    for row in z:
        cells = insert(cells, row[None], torch.ones(1, dtype=torch.float64), ONES.double())
    n, mean = cells
    assert n.shape == (1, 8)
    assert float(n.sum()) == 200
    assert torch.allclose((n[0, :, None] * mean[0]).sum(0), z.sum(0))


def test_cells_keep_distant_windows_apart():
    z = torch.tensor([[0.0, 0], [9, 9], [0.1, 0], [9, 9.1], [0, 0.1], [-9, 9]])
    n, mean = stored(z, 3)
    assert sorted(n[0].tolist()) == [1, 2, 3]
    assert sorted(mean[0].round().tolist()) == [[-9, 9], [0, 0], [9, 9]]


def test_cells_measure_distances_in_units_of_the_scale():
    z = torch.tensor([[0.0, 0], [1, 0], [0, 5]])
    by_first, by_second = stored(z, 2, torch.tensor([100.0, 1])), stored(z, 2, torch.tensor([1.0, 100]))
    assert by_first[1][0].tolist() != by_second[1][0].tolist()
    assert [row[1] for row in by_first[1][0].tolist() if row[1]] == [5.0]


def test_cells_do_not_depend_on_other_users():
    draw = torch.Generator().manual_seed(0)
    z = torch.randn(30, 3, 2, generator=draw)
    together = torch.zeros(3, 4), torch.zeros(3, 4, 2)
    for rows in z:
        together = insert(together, rows, torch.ones(3), ONES)
    alone = stored(z[:, 1], 4)
    assert torch.equal(together[0][1], alone[0][0])
    assert torch.equal(together[1][1], alone[1][0])


def test_reduce_adds_free_cells_or_merges():
    n, mean = torch.ones(1, 3), torch.tensor([[[0.0, 0], [0, 1], [5, 5]]])
    assert reduce((n, mean), 5, ONES)[0].tolist() == [[1, 1, 1, 0, 0]]
    n, mean = reduce((n, mean), 2, ONES)
    assert sorted(zip(n[0].tolist(), mean[0].tolist(), strict=True)) == [(1, [5, 5]), (2, [0, 0.5])]

from __future__ import annotations

from fedbn_simulations.report.plots import _color, _stroke
from fedbn_simulations.report.style import PALETTE


def test_reference_is_dashed_and_others_differ():
    strokes = [(_color(i), *_stroke(i).values()) for i in range(2 * len(PALETTE) + 1)]
    assert strokes[0][1:] == ("--", "")
    assert all(line != "--" and marker for _, line, marker in strokes[1:])
    assert len(set(strokes)) == len(strokes)

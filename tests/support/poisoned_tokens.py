"""Tokens with NaN or Inf of either sign, at the first, a middle, the last and at every place of a row."""

import numpy as np

KINDS = [(bad, place) for bad in (np.nan, -np.nan, np.inf, -np.inf) for place in ("first", "middle", "last", "all")]


def poison(x, step=1):
    """x f32 [T, H] -> (x with KINDS[i] in row 1 + i * step, x with zeros in those rows, which rows they are)."""
    poisoned, zeroed, rows = np.array(x, np.float32), np.array(x, np.float32), np.zeros(len(x), bool)
    for i, (bad, place) in enumerate(KINDS):
        row = 1 + i * step
        columns = {"first": 0, "middle": x.shape[1] // 2 - 3, "last": -1, "all": slice(None)}[place]
        poisoned[row, columns], zeroed[row], rows[row] = bad, 0, True
    return poisoned, zeroed, rows


def check_outputs(y, y_of_zeroed, rows):
    """No value of a poisoned row is finite, and the other rows are those of the batch with zeros in its place."""
    y, y_of_zeroed = np.asarray(y), np.asarray(y_of_zeroed)
    finite = np.isfinite(y.astype(np.float32))
    assert not finite[rows].any()
    assert finite[~rows].all() and y_of_zeroed[~rows].astype(np.float32).any(axis=1).all()
    np.testing.assert_array_equal(y[~rows].view(np.uint8), y_of_zeroed[~rows].view(np.uint8))

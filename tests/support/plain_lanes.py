"""Kernels of lanes as plain arithmetic on numpy arrays, block after block: much faster than interpret mode.

What this cannot see is left to interpret mode: races, barriers that are missing, several warpgroups.
"""

import contextlib
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.simt import lane_memory, lanes, launch


class _Ref:
    """A reference whose memory is a numpy array."""

    def __init__(self, array):
        self.array = array
        self.shape, self.dtype, self.size = array.shape, array.dtype, array.size

    def __getitem__(self, index):
        return jnp.asarray(self.array[index])

    def __setitem__(self, index, value):
        self.array[index] = value


def _fresh(struct):
    """Memory that nobody has written yet: 0x7F in every byte."""
    return np.full(int(np.prod(struct.shape)) * np.dtype(struct.dtype).itemsize, 0x7F, np.uint8)


def _ref_like(struct):
    return _Ref(_fresh(struct).view(struct.dtype).reshape(struct.shape))


def _kernel(body, out_type, *, grid, scratch_types=(), interpret=None):
    """`launch.kernel` for kernels of one warpgroup."""
    outs, structure = jax.tree.flatten(out_type)

    def run(*operands):
        inputs, results = [_Ref(np.array(x)) for x in operands], [_ref_like(s) for s in outs]
        for block in range(grid):
            with lanes.interpreting(), mock.patch.object(lanes, "block_index", lambda block=block: jnp.int32(block)):
                body(*inputs, *results, *map(_ref_like, scratch_types))
        return jax.tree.unflatten(structure, [jnp.asarray(r.array) for r in results])

    return run


def _scatter(ref, index, values, dtype, where):
    """`lane_memory.interpret_scatter` in one step."""
    unsigned = np.dtype(f"uint{8 * np.dtype(dtype).itemsize}")
    cells = np.stack([np.asarray(v).astype(unsigned) for v in values], axis=-1)
    memory = ref.array.reshape(-1).view(unsigned).reshape(-1, len(values))
    memory[np.asarray(index)[np.asarray(where)]] = cells[np.asarray(where)]


def _fori_loop(lower, upper, body, init):
    for i in range(int(lower), int(upper)):
        init = body(jnp.int32(i), init)
    return init


def _when(condition):
    return lambda body: body() if condition else None


@contextlib.contextmanager
def plain_kernels():
    """Within it kernels of one warpgroup run so."""
    with (
        mock.patch.object(launch, "kernel", _kernel),
        mock.patch.object(lane_memory, "interpret_scatter", _scatter),
        mock.patch.object(jax.lax, "fori_loop", _fori_loop),
        mock.patch.object(lanes, "when", _when),
    ):
        yield

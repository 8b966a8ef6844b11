"""Receive buffers that a program keeps, so that expert dispatch needs no barrier between the devices before it.

XLA lets all devices meet in front of a kernel that stores to its peers: their buffers may still hold something else. A
program that keeps its receive buffers, and dispatches more than once, can do without from the second time on:

    buffers = ReceiveBuffers()                      # once per program
    d = dispatch(..., buffers=buffers)              # inside shard_map(check_vma=False); XLA's barrier, this time
    ...
    d = dispatch(..., buffers=d.buffers)            # of the next layer: none

Two sets of buffers take turns. A device that has finished a dispatch knows by the signals of all peers that they have
begun it, and so are done with the rows of the one before: nobody reads the set that comes next. For that, what reads
a dispatch's rows must come before the next one: something that depends on it must be an input of the next, as with the
layers of a model. The signals go to counters that are never reset; every block of threads counts for itself how often
it met. All devices must run the same dispatches in the same order, of the same shapes.

The arrays go through every dispatch of the program and are changed in place. Where something else still needs what is
overwritten, XLA copies first, and a copy in the middle of a program would lose what a faster peer has stored already.
`copies_in` finds such copies in a compiled program; with rows that are used up in time there are none.
"""

import dataclasses
import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import dispatch as dispatch_kernels
from pallas_kernels.meeting import COUNTER_WORDS


@functools.partial(jax.tree_util.register_dataclass, data_fields=["sets", "counters"], meta_fields=["turn"])
@dataclasses.dataclass(frozen=True)
class ReceiveBuffers:
    """sets: two tuples of arrays like what a dispatch receives, counters: i32 [blocks, 32]; None: not made yet.

    turn: 0 before the first dispatch, then 1 and 2 in turns.
    """

    sets: Any = None
    counters: Any = None
    turn: int = 0


def run(parts: Any, ids: jax.Array, weights: jax.Array, buffers: ReceiveBuffers, **options: Any) -> tuple[Any, ...]:
    """`pallas_kernels.dispatch.dispatch` into the set whose turn it is -> its four results, and the buffers."""
    kernel = dispatch_kernels.Kernel(parts, options["routes"], options["encode"], None, options["axis_name"])
    sets, counters = buffers.sets, buffers.counters
    if sets is None:
        sets = [[lax.empty(t.shape, t.dtype) for t in kernel.targets()] for _ in range(2)]
        counters = jnp.zeros((kernel.config.blocks, COUNTER_WORDS), jnp.int32)
    shapes = [(t.shape, t.dtype) for t in kernel.targets()]
    if [(a.shape, a.dtype) for a in sets[0]] != shapes or counters.shape[0] != kernel.config.blocks:
        found = [(a.shape, str(a.dtype)) for a in sets[0]]
        raise ValueError(f"dispatch: the buffers are {found} for other calls than this one, which needs {shapes}")
    # All of them go through every kernel, so that none moves behind the first barrier.
    refs = [[jax.new_ref(a) for a in some] for some in sets]
    counters_ref = jax.new_ref(counters)
    now = buffers.turn % 2
    send_map = kernel.run_into(ids, weights, refs[now], [*refs[1 - now], counters_ref], first=buffers.turn == 0)
    sets = tuple(tuple(jax.freeze(r) for r in some) for some in refs)
    buffers = ReceiveBuffers(sets, jax.freeze(counters_ref), 1 + buffers.turn % 2)
    return (*kernel.unpacked(sets[now]), send_map, buffers)


def copies_in(compiled: jax.stages.Compiled, buffers: ReceiveBuffers) -> list[str]:
    """Instructions of a compiled program that copy an array like one of the buffers (structs suffice)."""
    names = {"int32": "s32", "float32": "f32", "uint8": "u8", "bfloat16": "bf16", "float8_e4m3fn": "f8e4m3fn"}
    arrays = jax.tree.leaves((buffers.sets, buffers.counters))
    shapes = {f"{names[str(a.dtype)]}[{','.join(map(str, a.shape))}]" for a in arrays}
    found = re.findall(r"^.*= (\S+?)(?:\{\S*\})? copy\(.*$", str(compiled.as_text()), re.MULTILINE)
    return [shape for shape in found if shape in shapes]

"""Receive buffers that a program keeps, so that tokens cross without a barrier between the devices.

XLA lets all devices meet in front of a kernel that stores to its peers: their buffers may still hold something else. A
program that keeps its receive buffers, and sends tokens more than once, can do without from the second time on:

    buffers = ReceiveBuffers()                      # once per program, inside shard_map(check_vma=False)
    d = dispatch(..., buffers=buffers)              # XLA's barrier, this time
    y, buffers = combine_into_buffers(y, row_map, d)    # here too; the experts' rows go straight home
    d = dispatch(..., buffers=buffers)              # of the next layer: none

Two sets of buffers take turns, there as on the way back. A device that has finished a dispatch knows by the signals of
all peers that they have begun it, and so are done with the rows of the one before: nobody reads the set that comes
next. For that, what reads a dispatch's rows must come before the next one: something that depends on it must be an
input of the next, as with the layers of a model. The signals go to counters that are never reset; every block of
threads counts for itself how often it met (32 bits: some million calls in one program). All devices must run the same
calls in the same order, of the same shapes.

The arrays go through every call of the program and are changed in place. Where something else still needs what is
overwritten, XLA copies first, and a copy in the middle of a program would lose what a faster peer has stored already.
`check_no_copies` looks for such copies in a compiled program; with rows that are used up in time there are none.
"""

import dataclasses
import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.exchange import dispatch as dispatch_kernels, push_combine as combine_kernels
from pallas_kernels.exchange.meeting import COUNTER_WORDS


@functools.partial(jax.tree_util.register_dataclass, data_fields=["sets", "counters"], meta_fields=["turn"])
@dataclasses.dataclass(frozen=True)
class KeptArrays:
    """sets: two tuples of arrays that calls receive into, counters: i32 [blocks, 32]; None: not made yet.

    turn: 0 before the first call, then 1 and 2 in turns.
    """

    sets: Any = None
    counters: Any = None
    turn: int = 0


@functools.partial(jax.tree_util.register_dataclass, data_fields=["there", "back"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class ReceiveBuffers:
    """What a program keeps: there, for the rows that dispatches receive; back, for partial sums on their way back."""

    there: KeptArrays = KeptArrays()
    back: KeptArrays = KeptArrays()


class _Turn:
    """One call's references to kept arrays: `now` to the set whose turn it is, `kept` to the rest and the counters."""

    def __init__(self, arrays: KeptArrays, targets: list[jax.ShapeDtypeStruct], blocks: int, op: str):
        sets, counters = arrays.sets, arrays.counters
        if sets is None:
            sets = [[lax.empty(t.shape, t.dtype) for t in targets] for _ in range(2)]
            counters = jnp.zeros((blocks, COUNTER_WORDS), jnp.int32)
        shapes = [(t.shape, t.dtype) for t in targets]
        if [(a.shape, a.dtype) for a in sets[0]] != shapes or counters.shape[0] != blocks:
            found = [(a.shape, str(a.dtype)) for a in sets[0]]
            raise ValueError(f"{op}: the buffers are {found} for other calls than this one, which needs {shapes}")
        # All of them go through every kernel, so that none moves behind the first barrier.
        self._sets = [[jax.new_ref(a) for a in some] for some in sets]
        self._counters = jax.new_ref(counters)
        self._turn = arrays.turn
        self.first = arrays.turn == 0
        self.now = self._sets[arrays.turn % 2]
        self.kept = [*self._sets[1 - arrays.turn % 2], self._counters]

    def end(self) -> tuple[tuple[jax.Array, ...], KeptArrays]:
        """What was received, and all arrays for the next turn."""
        sets = tuple(tuple(jax.freeze(r) for r in some) for some in self._sets)
        return sets[self._turn % 2], KeptArrays(sets, jax.freeze(self._counters), 1 + self._turn % 2)


def run(parts: Any, ids: jax.Array, weights: jax.Array, buffers: ReceiveBuffers, **options: Any) -> tuple[Any, ...]:
    """`pallas_kernels.dispatch.dispatch` into the set whose turn it is -> its four results, and the buffers."""
    kernel = dispatch_kernels.Kernel(parts, options["routes"], options["encode"], None, options["axis_name"])
    turn = _Turn(buffers.there, kernel.targets(), kernel.config.blocks, "dispatch")
    send_map = kernel.run_into(ids, weights, turn.now, turn.kept, first=turn.first)
    received, there = turn.end()
    return (*kernel.unpacked(received), send_map, dataclasses.replace(buffers, there=there))


def run_back(
    y: jax.Array, row_map: jax.Array, dispatched: Any, topk_weights: jax.Array, *, axis_name: str, config: Any
) -> tuple[jax.Array, ReceiveBuffers]:
    """`pallas_kernels.push_combine` into the set whose turn it is -> the tokens [T, H], and the buffers.

    Arguments as in `expert_parallel.combine_into_buffers`, which checks them; y [rows, H]. config: the kernel's.
    """
    devices = lax.axis_size(axis_name)
    target = jax.ShapeDtypeStruct((devices, row_map.shape[0] // devices, y.shape[1]), y.dtype)
    turn = _Turn(dispatched.buffers.back, [target], config.blocks, "combine")
    out = combine_kernels.push_combine(
        y, combine_kernels.Received(row_map, dispatched.local_weights, dispatched.local_ids),
        combine_kernels.Home(dispatched.send_map, topk_weights),
        combine_kernels.Buffers(turn.now[0], turn.kept, turn.first),
        devices=devices, axis_name=axis_name, config=config,
    )  # fmt: skip
    _, back = turn.end()
    return out, dataclasses.replace(dispatched.buffers, back=back)


def check_no_copies(compiled: jax.stages.Compiled) -> None:
    """Raises RuntimeError if a program copies an array of the shape of one that its kernels change in place.

    Also where no kernel changes any: for programs with `ReceiveBuffers` only.
    """
    text = str(compiled.as_text())
    kept: set[str] = set()  # shapes, not instructions: a copy may be an operand of a loop
    for results, aliases in _IN_PLACE.findall(text):
        shapes = [dtype_and_shape for dtype_and_shape, _ in _SHAPE.findall(results)]
        changed = {shapes[int(i or 0)] for i in _ALIASED.findall(aliases)}
        kept |= {shape for shape in changed if "," in shape}  # semaphores of kernels have one axis, and are copied
    if not kept:
        raise RuntimeError(
            "the program has no kernel that changes receive buffers in place: is its text of another kind?"
        )
    if copied := sorted(kept.intersection(first or only for first, only in _COPY.findall(text))):
        raise RuntimeError(
            f"the program copies arrays like its receive buffers ({', '.join(copied)}): rows that a faster device has "
            "stored would be lost. Something still needs what a dispatch before received; see "
            "fp4jax.expert_parallel.low_latency"
        )


_SHAPE = re.compile(r"(\w+\[[\d,]*\])(\{[^}]*\})?")
# An instruction: results, and which of them are operands changed in place; in the text of a compiled program.
_IN_PLACE = re.compile(r"^.* = (.*?) custom-call\(.*mosaic_gpu.*output_to_operand_aliasing=\{(.*?\}\))\}", re.MULTILINE)
_ALIASED = re.compile(r"\{(\d*)\}: \(")
# Of an array, or the begin of one (its first result).
_COPY = re.compile(r" = (?:\((\w+\[[\d,]*\])[^=]*?\)|(\w+\[[\d,]*\])(?:\{[^}]*\})?) copy(?:-start)?\(")

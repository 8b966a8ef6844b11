"""Receive buffers that a program keeps, so that only its first dispatch and its first combine need a barrier.

A kernel that stores rows into the memory of a peer must know that the peer no longer uses that memory. XLA ensures this
with a barrier: all devices meet before the kernel starts. A program that runs many layers can keep its receive buffers
instead of getting new ones in every layer. It then needs the barrier in the first layer only:

    buffers = ReceiveBuffers()                              # once per run of the program, in shard_map(check_vma=False)
    for layer in layers:
        d = dispatch(x, ..., buffers=buffers)               # barrier in the first layer
        y, row_map = ...                                    # permute and experts
        x, buffers = combine_into_buffers(y, row_map, d)    # barrier in the first layer

Why no other barrier is needed:

1. There are two sets of receive arrays for dispatches, which take turns: dispatch n of the program, n = 0, 1, ...,
   receives into set n % 2.
2. Every dispatch ends with a meeting. After its stores, a device signals every peer, and then it waits for the signals
   of all peers. (Each block of threads meets the blocks of the same index.) So a device that has finished dispatch n
   has received all its rows, and it knows that every peer has begun dispatch n.
3. A peer that has begun dispatch n has finished what comes before it in the program. That includes all reads of the
   rows of dispatch n - 1, which are in set (n - 1) % 2. No device reads that set any more.
4. Dispatch n + 1 receives into just that set, because (n + 1) % 2 = (n - 1) % 2. So a device that has finished dispatch
   n may start dispatch n + 1 at once, even if its peers are still busy with the rows of dispatch n.

Combines have two sets of arrays of their own. A combine stores partial sums into the peers' arrays, meets, and adds up
what it received. The same steps hold, and the kernel itself is the only reader of its rows.

The signals of a meeting increment counters. Nobody resets them, because a fast peer may signal again before the reset.
Instead every block of threads counts its meetings, and so knows which value of the counter to wait for. The counters
have 32 bits, which is enough for some million calls in one run of a program.

What the caller must do:

* Pass the buffers that each call returns to the next call, as above. The loop is a Python loop: whose turn it is, is
  static.
* Run the same calls in the same order on all devices. All dispatches of a program must have the same shapes, and so
  must all its combines.
* Finish reading the rows of a dispatch before the next dispatch (step 3 relies on it). XLA keeps this order only if an
  input of the next dispatch depends on what was computed from the rows, as in the layers of a model.
* Call `check_no_copies` on the compiled program. Every kernel changes the arrays in place. If something needs the old
  contents of an array after that, XLA copies the array, and rows that a faster peer has stored meanwhile can be lost.
  A program that finishes reading in time has no such copies.
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
    """The arrays of one direction. `sets` and `counters` are None until the first call makes them.

    Attributes:
      sets: two tuples of arrays that calls receive into, in turns.
      counters: i32 [blocks, 32], the counts of signals and of meetings of the kernel's blocks of threads.
      turn: 0 before the first call, then alternately 1 and 2. The next call receives into `sets[turn % 2]`. It is
        static, and 0 tells the first call that it needs the barrier.
    """

    sets: Any = None
    counters: Any = None
    turn: int = 0


@functools.partial(jax.tree_util.register_dataclass, data_fields=["there", "back"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class ReceiveBuffers:
    """The receive buffers of a program. `ReceiveBuffers()` starts without arrays; the first calls make them.

    Attributes:
      there: arrays for the rows that dispatches receive.
      back: arrays for the partial sums that combines receive.
    """

    there: KeptArrays = KeptArrays()
    back: KeptArrays = KeptArrays()


class _Turn:
    """One call's references to the kept arrays.

    Attributes:
      first: whether this is the first call, which needs XLA's barrier.
      now: references to the set that this call receives into.
      kept: references to the other set, then to the counters.
    """

    def __init__(self, arrays: KeptArrays, targets: list[jax.ShapeDtypeStruct], blocks: int, op: str):
        sets, counters = arrays.sets, arrays.counters
        if sets is None:
            sets = [[lax.empty(t.shape, t.dtype) for t in targets] for _ in range(2)]
            counters = jnp.zeros((blocks, COUNTER_WORDS), jnp.int32)
        shapes = [(t.shape, t.dtype) for t in targets]
        if [(a.shape, a.dtype) for a in sets[0]] != shapes or counters.shape[0] != blocks:
            found = [(a.shape, str(a.dtype)) for a in sets[0]]
            raise ValueError(f"{op}: the buffers are {found} for other calls than this one, which needs {shapes}")
        # Every kernel takes all arrays, also the set that it does not use. XLA must then make all of them before the
        # first kernel and its barrier. If it made a set later, a faster peer could store rows before the set exists.
        self._sets = [[jax.new_ref(a) for a in some] for some in sets]
        self._counters = jax.new_ref(counters)
        self._turn = arrays.turn
        self.first = arrays.turn == 0
        self.now = self._sets[arrays.turn % 2]
        self.kept = [*self._sets[1 - arrays.turn % 2], self._counters]

    def end(self) -> tuple[tuple[jax.Array, ...], KeptArrays]:
        """Returns the set that this call received into, and all arrays for the next call."""
        sets = tuple(tuple(jax.freeze(r) for r in some) for some in self._sets)
        return sets[self._turn % 2], KeptArrays(sets, jax.freeze(self._counters), 1 + self._turn % 2)


def run(parts: Any, ids: jax.Array, weights: jax.Array, buffers: ReceiveBuffers, **options: Any) -> tuple[Any, ...]:
    """Runs the kernel of `pallas_kernels.exchange.dispatch.dispatch` so that it receives into the kept arrays.

    Args:
      parts: as the kernel takes them.
      ids: i32 [T, k], global ids of experts.
      weights: f32 [T, k].
      buffers: what the program keeps.
      options: `routes`, `encode` and `axis_name`, as the kernel takes them.

    Returns:
      The received parts, local ids, weights (None per_slot) and send map, as the kernel returns them, and the buffers.

    Raises:
      ValueError: the kept arrays have other shapes than this call needs.
    """
    kernel = dispatch_kernels.Kernel(parts, options["routes"], options["encode"], None, options["axis_name"])
    turn = _Turn(buffers.there, kernel.targets(), kernel.config.blocks, "dispatch")
    send_map = kernel.run_into(ids, weights, turn.now, turn.kept, first=turn.first)
    received, there = turn.end()
    return (*kernel.unpacked(received), send_map, dataclasses.replace(buffers, there=there))


def run_back(
    y: jax.Array, row_map: jax.Array, dispatched: Any, topk_weights: jax.Array, residual: jax.Array | None, *,
    axis_name: str, config: Any,
) -> tuple[jax.Array, ReceiveBuffers]:  # fmt: skip
    """Runs `pallas_kernels.exchange.push_combine` so that it receives into the kept arrays.

    The arguments are those of `exchange.combine_into_buffers`, which checks them.

    Args:
      y: [rows, H].
      row_map: i32 [R*C, k].
      dispatched: the `exchange.Dispatched` of a dispatch with buffers.
      topk_weights: f32, of the shape of the send map.
      residual: [T, H] in y's dtype, or None.
      axis_name: the mesh axis.
      config: the tuning of the kernel.

    Returns:
      The tokens [T, H], and the buffers.

    Raises:
      ValueError: the kept arrays have other shapes than this call needs.
    """
    devices = lax.axis_size(axis_name)
    target = jax.ShapeDtypeStruct((devices, row_map.shape[0] // devices, y.shape[1]), y.dtype)
    turn = _Turn(dispatched.buffers.back, [target], config.blocks, "combine")
    out = combine_kernels.push_combine(
        y, combine_kernels.Received(row_map, dispatched.local_weights, dispatched.local_ids),
        combine_kernels.Home(dispatched.send_map, topk_weights, residual),
        combine_kernels.Buffers(turn.now[0], turn.kept, turn.first),
        devices=devices, axis_name=axis_name, config=config,
    )  # fmt: skip
    _, back = turn.end()
    return out, dataclasses.replace(dispatched.buffers, back=back)


def check_no_copies(compiled: jax.stages.Compiled) -> None:
    """Raises RuntimeError if a compiled program with `ReceiveBuffers` copies an array that may be one of them.

    A copy is suspect if its dtype and shape are those of an array that a kernel of the program changes in place. A
    program without such a kernel is an error too.
    """
    text = str(compiled.as_text())
    kept: set[str] = set()  # dtypes and shapes: a copy may reach its kernel through a loop
    for results, aliases in _IN_PLACE.findall(text):
        shapes = [dtype_and_shape for dtype_and_shape, _ in _SHAPE.findall(results)]
        changed = {shapes[int(i or 0)] for i in _ALIASED.findall(aliases)}
        kept |= {shape for shape in changed if "," in shape}  # one axis: semaphores, which may be copied
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
# A kernel in the text of a compiled program: its results, and which of them are operands that it changes in place.
_IN_PLACE = re.compile(r"^.* = (.*?) custom-call\(.*mosaic_gpu.*output_to_operand_aliasing=\{(.*?\}\))\}", re.MULTILINE)
_ALIASED = re.compile(r"\{(\d*)\}: \(")
# A copy of an array: the first result of a copy-start, or the only result of a copy.
_COPY = re.compile(r" = (?:\((\w+\[[\d,]*\])[^=]*?\)|(\w+\[[\d,]*\])(?:\{[^}]*\})?) copy(?:-start)?\(")

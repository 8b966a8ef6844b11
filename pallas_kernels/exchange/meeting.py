"""Meetings: points where the thread blocks of kernels on several devices wait for each other."""

from typing import Any

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import utils as mgpu_utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, memref

from pallas_kernels.simt import lanes

# Words of a thread block in an array of counters: word 0 is what peers increment, word 1 how often the thread block
# met. The other words keep the counters of different thread blocks 128 bytes apart.
COUNTER_WORDS = 32


class Meeting:
    """Thread blocks of the same index on all devices wait for each other.

    semaphore: of the thread block; peers increment it. barrier: of its warpgroups, None if there is only one.
    """

    def __init__(self, semaphore: Any, barrier: Any = None):
        self.semaphore, self.barrier = semaphore, barrier

    @staticmethod
    def scratch(warpgroups: int) -> list[Any]:
        """Scratch of a kernel that meets: semaphore and barrier."""
        return [plgpu.SemaphoreType.REGULAR, *_barriers(warpgroups)]

    def meet(self, devices: int, warpgroups: int) -> None:
        """Ends a kernel: warpgroup 0 waits for the peers' thread blocks, so that the thread block does not end before.

        Every device sees after the meeting what the others stored before it.
        """
        if warpgroups == 1:
            lanes.sync()
            self._signal_and_wait(devices)
            return
        lanes.sync()
        plgpu.barrier_arrive(self.barrier)

        @pl.when(lanes.warpgroup_index() == 0)
        def _():  # signals are expensive, so a thread block sends one to each peer
            plgpu.barrier_wait(self.barrier)
            lanes.sync()  # one thread signals, after all threads are here
            self._signal_and_wait(devices)

    def _signal_and_wait(self, devices: int) -> None:
        _signal([plgpu.remote_ref(self.semaphore, jnp.int32(d)) for d in range(devices)])
        pl.semaphore_wait(self.semaphore, devices, decrement=False)


class CountedMeeting(Meeting):
    """A `Meeting` with counters in place of a semaphore: i32 [blocks, 32], zeros at first, which outlive the kernel.

    A thread block waits until its counter is `devices` times the number of meetings it has had, this one included. So
    nothing has to be reset between kernels.
    """

    def __init__(self, counters: Any, barrier: Any = None):
        super().__init__(counters, barrier)
        block = lanes.block_index()
        self._counter, self._meetings = (counters.at[block, pl.ds(word, 1)] for word in (0, 1))
        self._signals = 1

    @staticmethod
    def scratch(warpgroups: int) -> list[Any]:
        """Scratch of a kernel that meets: the barrier. The counters are an operand."""
        return _barriers(warpgroups)

    def _signal_and_wait(self, devices):
        block = lanes.block_index() if self._signals == 1 else 0
        _signal([plgpu.remote_ref(self.semaphore, jnp.int32(d)).at[block, pl.ds(0, 1)] for d in range(devices)])
        signals = self._signals * devices

        @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.RefType()))
        def wait(_, counter, meetings):
            i32, zero = ir.IntegerType.get_signless(32), arith.constant(ir.IndexType.get(), 0)
            now = arith.addi(memref.load(meetings, [zero]), arith.constant(i32, 1))
            target = arith.muli(now, arith.constant(i32, signals))
            mgpu_utils.SemaphoreRef(mgpu_utils.memref_ptr(counter)).wait(target, decrement=False)
            with mgpu_utils.single_thread(scope=mgpu_utils.ThreadSubset.WARPGROUP):
                memref.store(now, meetings, [zero])
            mgpu_utils.warpgroup_barrier()

        wait(self._counter, self._meetings)


class CommonMeeting(CountedMeeting):
    """A meeting in the middle of a kernel: all thread blocks of all devices wait for each other.

    They share one counter per device, that of thread block 0, and every warpgroup waits. All thread blocks must run at
    the same time. So each needs a multiprocessor, and no other kernel that waits for this one may occupy it.
    """

    def __init__(self, counters: Any, blocks: int, barrier: Any = None, met: Any = None):
        super().__init__(counters, barrier)
        self._counter, self._signals, self._met = counters.at[0, pl.ds(0, 1)], blocks, met

    @staticmethod
    def scratch(warpgroups: int) -> list[Any]:
        """Scratch of a kernel that meets: two barriers. The counters are an operand."""
        return [*_barriers(warpgroups), *_barriers(warpgroups, arrivals=1)]

    def meet(self, devices: int, warpgroups: int) -> None:
        """All warpgroups wait for all others. Each sees after the meeting what the others stored before it."""
        super().meet(devices, warpgroups)
        if warpgroups > 1:

            @pl.when(lanes.warpgroup_index() == 0)
            def _():
                plgpu.barrier_arrive(self._met)

            plgpu.barrier_wait(self._met)


def _barriers(warpgroups, arrivals=None):
    return [plgpu.Barrier(num_arrivals=arrivals or warpgroups)] if warpgroups > 1 else []


def _signal(refs: list[Any]) -> None:
    """One thread increments the counters of several devices, after a single fence.

    A signal with release semantics of its own would wait until the signal before it has reached its peer.
    """

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),) * len(refs))
    def signal(_, *counters):
        with mgpu_utils.single_thread(scope=mgpu_utils.ThreadSubset.WARPGROUP):
            mgpu_utils.fence_release_sys()
            for counter in counters:
                ref = mgpu_utils.SemaphoreRef(mgpu_utils.memref_ptr(counter))
                ref.signal(1, predicate=arith.constant(ir.IntegerType.get_signless(1), 1), relaxed=True)

    signal(*refs)

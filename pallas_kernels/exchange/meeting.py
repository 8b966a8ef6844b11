"""Where kernels that reach into other devices' memory wait for each other."""

from typing import Any

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import utils as mgpu_utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, memref

from pallas_kernels.simt import lanes

COUNTER_WORDS = 32  # of a block in an array of counters: what peers increment, how often it met, and 120 bytes of room


class Meeting:
    """Where the blocks of the same index of all devices wait for each other: a semaphore and a barrier of the block."""

    def __init__(self, semaphore: Any, barrier: Any = None):
        self.semaphore, self.barrier = semaphore, barrier

    @staticmethod
    def scratch(warpgroups: int) -> list[Any]:
        """What a kernel that meets needs."""
        return [plgpu.SemaphoreType.REGULAR, *_barriers(warpgroups)]

    def meet(self, devices: int, warpgroups: int) -> None:
        """The end of a kernel: warpgroup 0 waits until everybody's block is here, so that no block leaves before.

        What was stored before is visible to all of them after it.
        """
        if warpgroups == 1:
            lanes.sync()
            self._signal_and_wait(devices)
            return
        lanes.sync()
        plgpu.barrier_arrive(self.barrier)

        @pl.when(lanes.warpgroup_index() == 0)
        def _():  # signals are expensive: one block, one signal
            plgpu.barrier_wait(self.barrier)
            lanes.sync()  # one thread signals for all
            self._signal_and_wait(devices)

    def _signal_and_wait(self, devices: int) -> None:
        _signal([plgpu.remote_ref(self.semaphore, jnp.int32(d)) for d in range(devices)])
        pl.semaphore_wait(self.semaphore, devices, decrement=False)


class CountedMeeting(Meeting):
    """The same with counters i32 [blocks, 32] that outlive the kernel, zeros at first: nothing need be reset.

    A block waits until its counter is `devices` times as large as the number of meetings it has had, this one included.
    """

    def __init__(self, counters: Any, barrier: Any = None):
        super().__init__(counters, barrier)
        block = lanes.block_index()
        self._counter, self._meetings = (counters.at[block, pl.ds(word, 1)] for word in (0, 1))
        self._signals = 1

    @staticmethod
    def scratch(warpgroups: int) -> list[Any]:
        """What a kernel that meets needs, beside the counters."""
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
    """In the middle of a kernel: all blocks of all devices wait for all, with one counter, that of block 0.

    Every warpgroup of a block goes on only then. All blocks must be at work at once: there must be a multiprocessor for
    each, which nothing occupies that waits for one of them.
    """

    def __init__(self, counters: Any, blocks: int, barrier: Any = None, met: Any = None):
        super().__init__(counters, barrier)
        self._counter, self._signals, self._met = counters.at[0, pl.ds(0, 1)], blocks, met

    @staticmethod
    def scratch(warpgroups: int) -> list[Any]:
        """What a kernel that meets needs, beside the counters."""
        return [*_barriers(warpgroups), *_barriers(warpgroups, arrivals=1)]

    def meet(self, devices: int, warpgroups: int) -> None:
        """All warpgroups wait until everybody is here; what was stored before is visible to all of them after it."""
        super().meet(devices, warpgroups)
        if warpgroups > 1:

            @pl.when(lanes.warpgroup_index() == 0)
            def _():
                plgpu.barrier_arrive(self._met)

            plgpu.barrier_wait(self._met)


def _barriers(warpgroups, arrivals=None):
    return [plgpu.Barrier(num_arrivals=arrivals or warpgroups)] if warpgroups > 1 else []


def _signal(refs: list[Any]) -> None:
    """One thread increments counters of several devices, behind one fence for all.

    A release per signal would wait, each time, until the signal before has arrived at its peer.
    """

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),) * len(refs))
    def signal(_, *counters):
        with mgpu_utils.single_thread(scope=mgpu_utils.ThreadSubset.WARPGROUP):
            mgpu_utils.fence_release_sys()
            for counter in counters:
                ref = mgpu_utils.SemaphoreRef(mgpu_utils.memref_ptr(counter))
                ref.signal(1, predicate=arith.constant(ir.IntegerType.get_signless(1), 1), relaxed=True)

    signal(*refs)

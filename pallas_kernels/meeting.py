"""The end of a kernel that reaches into other devices' memory: nobody leaves before everybody has arrived."""

from typing import Any

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import utils as mgpu_utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, memref

from pallas_kernels import lanes

COUNTER_WORDS = 32  # of a block in an array of counters: what peers increment, how often it met, and 120 bytes of room


class Meeting:
    """Where the blocks of the same index of all devices wait for each other: a semaphore and a barrier of the block."""

    def __init__(self, semaphore: Any, barrier: Any = None):
        self.semaphore, self.barrier = semaphore, barrier

    @staticmethod
    def scratch(warpgroups: int) -> list[Any]:
        """What a kernel that meets needs."""
        return [plgpu.SemaphoreType.REGULAR, *([plgpu.Barrier(num_arrivals=warpgroups)] if warpgroups > 1 else [])]

    def meet(self, devices: int, warpgroups: int) -> None:
        """Waits until everybody's block is here; what was stored before is visible to all of them after it."""
        if warpgroups == 1:
            self._signal_and_wait(devices)
            return
        lanes.sync()
        plgpu.barrier_arrive(self.barrier)

        @pl.when(lanes.warpgroup_index() == 0)
        def _():  # signals are expensive: one block, one signal
            plgpu.barrier_wait(self.barrier)
            self._signal_and_wait(devices)

    def _signal_and_wait(self, devices: int) -> None:
        lanes.sync()  # one thread signals for all
        for d in range(devices):
            pl.semaphore_signal(self.semaphore, device_id=jnp.int32(d))
        pl.semaphore_wait(self.semaphore, devices, decrement=False)


class CountedMeeting(Meeting):
    """The same with counters i32 [blocks, 32] that outlive the kernel, zeros at first: nothing need be reset.

    A block waits until its counter is `devices` times as large as the number of meetings it has had, this one included.
    """

    @staticmethod
    def scratch(warpgroups: int) -> list[Any]:
        """What a kernel that meets needs, beside the counters."""
        return Meeting.scratch(warpgroups)[1:]

    def _signal_and_wait(self, devices):
        block = lanes.block_index()
        for d in range(devices):

            @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))
            def signal(_, counter):
                mgpu_utils.warpgroup_barrier()
                mgpu_utils.SemaphoreRef(mgpu_utils.memref_ptr(counter)).signal(1)

            signal(plgpu.remote_ref(self.semaphore, jnp.int32(d)).at[block, pl.ds(0, 1)])

        @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.RefType()))
        def wait(_, counter, meetings):
            i32, zero = ir.IntegerType.get_signless(32), arith.constant(ir.IndexType.get(), 0)
            now = arith.addi(memref.load(meetings, [zero]), arith.constant(i32, 1))
            target = arith.muli(now, arith.constant(i32, devices))
            mgpu_utils.SemaphoreRef(mgpu_utils.memref_ptr(counter)).wait(target, decrement=False)
            with mgpu_utils.single_thread(scope=mgpu_utils.ThreadSubset.WARPGROUP):
                memref.store(now, meetings, [zero])
            mgpu_utils.warpgroup_barrier()

        wait(self.semaphore.at[block, pl.ds(0, 1)], self.semaphore.at[block, pl.ds(1, 1)])

"""Expert parallelism: tokens cross a mesh axis to the devices that hold their experts, and their results come back."""

from fp4jax.block_fp8 import from_fp8 as from_fp8
from fp4jax.expert_parallel.checks import FORMS as FORMS, Form as Form
from fp4jax.expert_parallel.exchange import (
    Dispatched as Dispatched,
    agree_global_scale as agree_global_scale,
    combine as combine,
    combine_into_buffers as combine_into_buffers,
    dispatch as dispatch,
)
from fp4jax.expert_parallel.hlo_collectives import WireBytes as WireBytes, wire_bytes as wire_bytes
from fp4jax.expert_parallel.low_latency import ReceiveBuffers as ReceiveBuffers, check_no_copies as check_no_copies
from fp4jax.expert_parallel.wire_formats import WIRE_FORMATS as WIRE_FORMATS, WireFormat as WireFormat

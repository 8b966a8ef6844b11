"""Configurations of the grouped GEMM's kernel, and which operands it accepts. choice.py chooses a configuration."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np

from pallas_kernels.gemm.weight_layout import TILE, WORDS
from pallas_kernels.rows.swiglu_quantize import OUTPUTS
from pallas_kernels.simt.hardware import LANES, SM_REGISTERS, SMEM_BYTES

_SMEM_ALIGNMENT = 1024  # bytes, of every buffer in shared memory
_MAX_BARRIERS = 32  # in one array of barriers; the kernel needs one per stage and one more
# Registers that a consumer needs beside its accumulators: A operand, descriptors, addresses. ptxas used 102 registers
# with accumulators of 72, and 126 were enough with accumulators of 96.
_WGMMA_REGISTERS = 30


@dataclasses.dataclass(frozen=True)
class TuningConfig:
    """How a thread block works: one warpgroup loads, `warpgroups` others multiply, and one more may store.

    tile_m: sizes of a tile of x that are compiled, in rows: ascending multiples of 8. A task takes the smallest that
      holds its rows, and has at most max(tile_m) rows.
    warpgroups: consumers. Each multiplies other weight tiles with the same tile of x.
    row_tiles: 64 x 64 weight tiles that a consumer multiplies side by side.
    k_tiles: tiles of 64 along K per pipeline stage.
    num_stages: pipeline stages.
    unroll: stages per iteration of the loop over K.
    in_flight: wgmmas that run on while the consumer decodes the next weights, 0 or 1.
    own_store: whether a warpgroup of its own stores the result of a task while the consumers multiply the next task.
      It costs registers, which the widest tile_m needs; without it the consumers store.
    """

    tile_m: tuple[int, ...]
    warpgroups: int = 2
    row_tiles: int = 1
    k_tiles: int = 1
    num_stages: int = 4
    unroll: int = 1
    in_flight: int = 1
    own_store: bool = True

    @property
    def tiles(self) -> int:
        """Weight tiles of a task; it computes 64 * tiles columns."""
        return self.warpgroups * self.row_tiles

    @property
    def registers(self) -> tuple[int, int, int]:
        """Registers per thread of the loader, a consumer and the storer.

        The loader and the storer give up registers, and the consumers take them, in steps of 8.
        """
        load, store = 24, min(104, self.registers_at_launch - 8) if self.own_store else 0
        rest = self.registers_at_launch * self.all_warpgroups - load - store
        return load, min(max(232, self.registers_at_launch), rest // self.warpgroups // 8 * 8), store

    @property
    def registers_at_launch(self) -> int:
        """Registers per thread when the kernel starts, the same for all warpgroups."""
        return min(248, SM_REGISTERS // (LANES * self.all_warpgroups) // 8 * 8)

    def smem_bytes(self, experts: int) -> int:
        """Shared memory of a thread block in bytes, for weights of so many experts."""
        tile_m, groups = max(self.tile_m), -(-experts // LANES)
        buffers = (
            self.num_stages * self.k_tiles * tile_m * TILE * 2,  # x
            self.num_stages * self.k_tiles * self.tiles * WORDS * TILE * 4,  # weights
            self.tiles * tile_m * TILE * 2,  # result
            self.warpgroups * -(-tile_m // LANES) * LANES * 4,  # token scales
            (3 * groups + 1) * LANES * 4,  # plan
            8 * (2 * self.num_stages + 5),  # barriers
        )
        return sum(-(-size // _SMEM_ALIGNMENT) * _SMEM_ALIGNMENT for size in buffers)

    @property
    def all_warpgroups(self) -> int:
        """Warpgroups of a thread block, loader and storer included."""
        return self.warpgroups + 1 + self.own_store


def check_config(
    x: Any,
    words: Any,
    w_scale: Any,
    counts: Any,
    x_scale: Any = None,
    *,
    out: str | None = None,
    act_scale: Any = None,
    config: TuningConfig | None = None,
) -> str | None:
    """None if `grouped_gemm` accepts these (arrays or ShapeDtypeStructs), else what does not fit."""
    if x.dtype != jnp.bfloat16:
        return f"x must be bfloat16, got {x.dtype}"
    if words.dtype != jnp.uint32 or words.ndim != 5 or words.shape[3:] != (WORDS, TILE) or 0 in words.shape:
        return f"words must be uint32 [E, N/64, K/64, 9, 64], not empty, got {words.dtype} {words.shape}"
    experts, n, k = words.shape[0], words.shape[1] * TILE, words.shape[2] * TILE
    if x.ndim not in (2, 3) or x.shape[-1] != k or 0 in x.shape or (x.ndim == 3 and x.shape[0] != experts):
        return f"x must be [E, M, K] or [rows, K], not empty, with E = {experts} and K = {k}, got {x.shape}"
    if counts.shape != (experts,) or w_scale.shape not in ((experts, 1), (experts, n)):
        return f"counts must be [E] and w_scale [E, 1] or [E, N], E = {experts}, got {counts.shape}, {w_scale.shape}"
    if counts.dtype not in (jnp.int32, jnp.int64) or w_scale.dtype != jnp.float32:
        return f"counts must be int32 or int64 and w_scale float32, got {counts.dtype} and {w_scale.dtype}"
    if x_scale is not None and x_scale.dtype != jnp.float32:
        return f"x_scale must be float32, got {x_scale.dtype}"
    rows = int(np.prod(x.shape[:-1], dtype=np.int64))
    if x_scale is not None and x_scale.shape not in ((experts,), (rows, 1)):
        return f"x_scale must be [E] or [rows, 1], got {x_scale.shape} for {rows} rows"
    if out is not None:
        if out not in OUTPUTS:
            return f"out must be None or one of {OUTPUTS}, got {out!r}"
        if n % (2 * TILE):
            return f"SwiGLU needs gate and up halves of a multiple of {TILE} rows, got N = {n}"
        if out != "bf16" and (act_scale is None or isinstance(act_scale, str)):
            return f"out={out!r} needs an array as act_scale, got {act_scale!r}"
    if rows * n // 8 >= 2**31 or experts * n >= 2**31:
        return f"x {x.shape} and N = {n} exceed the kernel's 32-bit indices"
    return None if config is None else _check_tuning(config, experts, out is not None)


def _check_tuning(config, experts, fused):
    sizes = config.tile_m
    if not sizes or any(size % 8 or not 8 <= size <= 256 for size in sizes) or list(sizes) != sorted({*sizes}):
        return f"tile_m must be ascending multiples of 8 up to 256, got {sizes}"
    if not 1 <= config.warpgroups <= 4 or not 1 <= config.row_tiles <= 4:
        return f"warpgroups and row_tiles must be 1..4, got {config.warpgroups} and {config.row_tiles}"
    if not 1 <= config.k_tiles <= 16 or not 2 <= config.num_stages < _MAX_BARRIERS or config.unroll < 1:
        return f"k_tiles must be 1..16, num_stages 2..{_MAX_BARRIERS - 1}, unroll at least 1, got {config}"
    if config.in_flight not in (0, 1):
        return f"in_flight must be 0 or 1, got {config.in_flight}"
    if config.in_flight and config.k_tiles * config.row_tiles * config.unroll < 2:
        # Otherwise the next iteration would decode into registers that a running wgmma still reads.
        return "in_flight=1 needs at least two weight tiles per iteration (k_tiles * row_tiles * unroll)"
    if fused and config.tiles % 2:
        return "SwiGLU needs as many gate tiles as up tiles per task: warpgroups * row_tiles must be even"
    if config.row_tiles * max(sizes) // 2 + _WGMMA_REGISTERS > config.registers_at_launch:
        return (
            f"tile_m {sizes} with row_tiles={config.row_tiles} does not fit {config.registers_at_launch} registers a "
            f"thread, what {config.all_warpgroups} warpgroups have at launch"
        )
    if (needed := config.smem_bytes(experts)) > SMEM_BYTES:
        return f"{config} needs {needed} bytes of shared memory, there are {SMEM_BYTES}"
    return None

"""Which operands the dense FP8 GEMM's kernel accepts, and which configuration it runs with."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np

from pallas_kernels.simt.formats import FP8_BLOCK
from pallas_kernels.simt.hardware import H100_SMS, SMEM_BYTES, WGMMA_ROWS


@dataclasses.dataclass(frozen=True)
class TuningConfig:
    """How a thread block works: one warpgroup loads, `warpgroups` others multiply and store.

    warpgroups: consumers; each multiplies 64 rows.
    tile_n: columns of a task.
    num_stages: pipeline stages.
    k_blocks: blocks of 128 along K in a stage. A consumer multiplies them at once, each into registers of its own. More
      than one pays for few rows, where the time goes into waiting for each stage.
    cluster: thread blocks that share rows of x, 1 or 2.
    """

    warpgroups: int
    tile_n: int
    num_stages: int
    k_blocks: int = 1
    cluster: int = 1

    @property
    def tile_m(self) -> int:
        """Rows of a task."""
        return self.warpgroups * WGMMA_ROWS

    def smem_bytes(self, out_bytes: int) -> int:
        """Shared memory of a thread block in bytes, for result values of `out_bytes` bytes."""
        stage = self.k_blocks * ((self.tile_m + self.tile_n) * FP8_BLOCK + 4 * self.tile_m)
        return self.num_stages * stage + self.tile_m * self.tile_n * out_bytes + 16 * self.num_stages + 2048


# Microseconds of a task per block of 128 along K, while every SM of an H100 has a task (measured:
# experiments/results/dense_log.md).
_STEP_US = {
    TuningConfig(3, 128, 4, cluster=2): 0.565,
    TuningConfig(2, 128, 4): 0.445,
    TuningConfig(2, 64, 3, k_blocks=2): 0.33,
    TuningConfig(1, 64, 3, k_blocks=3): 0.22,
    TuningConfig(1, 32, 4, k_blocks=4): 0.165,
}
CONFIGS = tuple(_STEP_US)


def check_config(x: Any, w: Any, x_scale: Any, w_scale: Any, out_dtype: Any) -> str | None:
    """None if `gemm` accepts these (arrays or ShapeDtypeStructs), else what does not fit."""
    for name, array in (("x", x), ("w", w)):
        if array.dtype != jnp.float8_e4m3fn or array.ndim != 2 or 0 in array.shape:
            return f"{name} must be float8_e4m3fn of two axes, not empty, got {array.dtype} {array.shape}"
    (m, k), n = x.shape, w.shape[0]
    if problem := shape_problem(m, n, k, out_dtype):
        return problem
    groups = -(-k // FP8_BLOCK)
    if w.shape[1] != k or x_scale.shape != (groups, scale_columns(m)) or w_scale.shape != (-(-n // FP8_BLOCK), groups):
        return f"w {w.shape}, x_scale {x_scale.shape} and w_scale {w_scale.shape} do not fit x {x.shape}"
    if x_scale.dtype != jnp.float32 or w_scale.dtype != jnp.float32:
        return f"scales must be float32, got {x_scale.dtype} and {w_scale.dtype}"
    return None


def shape_problem(m: int, n: int, k: int, out_dtype: Any) -> str | None:
    """None if the kernel multiplies x [M, K] by w [N, K], else why not.

    K and N have restrictions because rows are copied in pieces of 16 bytes.
    """
    if np.dtype(out_dtype) not in (np.dtype(jnp.bfloat16), np.dtype(jnp.float32)):
        return f"results must be bfloat16 or float32, got {out_dtype}"
    if k % 16 or n % 8:
        return f"K must be a multiple of 16 and N of 8, got K = {k}, N = {n}"
    if 0 in (m, n, k) or max(m * k, n * k, m * n) >= 2**31:
        return f"x [{m}, {k}] and w [{n}, {k}] are empty or exceed the kernel's 32-bit indices"
    return None


def scale_columns(rows: int) -> int:
    """Columns of x_scale: `rows` rounded up to 4, since its rows are copied in pieces of 16 bytes."""
    return -(-rows // 4) * 4


def choose(m: int, n: int, k: int, out_dtype: Any = jnp.bfloat16) -> TuningConfig:
    """The configuration with the least predicted time: waves of tasks times `_STEP_US` times blocks along K."""
    blocks = -(-k // FP8_BLOCK)

    def us(config: TuningConfig) -> float:
        tasks = -(-m // config.tile_m) * -(-n // (config.tile_n * config.cluster))
        return -(-tasks // (H100_SMS // config.cluster)) * blocks * _STEP_US[config]

    return fitted(min(CONFIGS, key=us), out_dtype)


def fitted(config: TuningConfig, out_dtype: Any) -> TuningConfig:
    """The configuration with as many stages as shared memory holds beside results of type `out_dtype`."""
    while config.smem_bytes(np.dtype(out_dtype).itemsize) > SMEM_BYTES:
        config = dataclasses.replace(config, num_stages=config.num_stages - 1)
    return config

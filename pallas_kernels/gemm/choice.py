"""Chooses the configuration of the grouped GEMM's kernel, by the shape and the expected rows per expert.

1. A shape that was tuned (same K, N and number of experts, about as many rows) takes the entry of the table tuned.json.
2. Another shape with few rows per expert takes the configuration that a model predicts to be the fastest. With few rows
   all SMs decode weights all the time, so the model multiplies the number of waves of tasks by the time of a wave.
3. Another shape with many rows has many waves with every configuration. It takes an entry of the table with the same K
   and N, or a rule of thumb where there is none.
"""

import dataclasses
import functools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from pallas_kernels.gemm.config import TuningConfig
from pallas_kernels.gemm.weight_layout import TILE
from pallas_kernels.simt.hardware import H100_SMS, SMEM_BYTES

# Key "ExKxN" or "swiglu ExKxN" -> rows per expert -> configuration. `experiments/bench_gemm.py --sweep` writes the
# table; its entries for 2 rows come from experiments/results/h100/gemm_few_rows.json.
TABLE = Path(__file__).with_name("tuned.json")
_TUNED_WITHIN = 0.5  # an entry for m rows per expert is used for m / 2^0.5 to m * 2^0.5 rows


def choose(k: int, n: int, experts: int, expected_m: float | int, *, fused: bool = False) -> TuningConfig:
    """The configuration for weights [experts, n, k] and `expected_m` rows per expert.

    fused: whether SwiGLU is computed in the epilogue. Then `n` counts the rows of gate and up together.
    """
    if experts == 1 and not fused:
        return dense(k, n, expected_m)
    expected_m = max(expected_m, 0.5)
    distance = lambda m: abs(math.log2(m / expected_m))  # noqa: E731
    same_weights = {e: by_m for (e, *shape), by_m in _table().items() if shape == [k, n, fused]}
    exact = same_weights.get(experts, {})
    if exact and distance(nearest := min(exact, key=distance)) <= _TUNED_WITHIN:
        config = exact[nearest]
    elif expected_m <= MOST_FEW_ROWS:
        return few_rows(k, n, experts, expected_m, fused=fused)
    elif same_weights:
        by_m = same_weights[min(same_weights, key=lambda e: abs(math.log2(e / experts)))]
        config = by_m[min(by_m, key=distance)]
    else:
        config = rule_of_thumb(k, expected_m)
    return _that_fits(config, experts)


def few_rows(k: int, n: int, experts: int, expected_m: float | int, *, fused: bool) -> TuningConfig:
    """The configuration with the least predicted time, for up to `MOST_FEW_ROWS` rows per expert.

    The prediction is the mean over random draws in which each row goes to any expert with the same probability.
    """
    of_rows = few_rows_configs(experts, expected_m, fused=fused)
    counts = _draw_counts(experts, max(1, round(experts * expected_m)))

    def us(config: TuningConfig) -> float:
        per_task = config.tiles // 2 if fused else config.tiles
        columns = -(-n // (2 * TILE if fused else TILE) // per_task)
        tasks = np.ceil(counts / max(config.tile_m)).sum(axis=1) * columns
        steps = -(-k // (TILE * config.k_tiles)) * config.k_tiles
        return float(np.ceil(tasks / H100_SMS).mean()) * (steps * of_rows[config] + config.tiles * _TASK_US)

    fitting = [config for config in of_rows if config.smem_bytes(experts) <= SMEM_BYTES] or list(of_rows)
    best = min(fitting, key=us)
    return best if us(best) < us(fitting[0]) / _WORTH_IT else fitting[0]


def few_rows_configs(experts: int, expected_m: float | int, *, fused: bool) -> dict[TuningConfig, float]:
    """The configurations that `few_rows` chooses from, and how many microseconds each takes per tile of K."""
    of_rows = _STEP_US[min(m for m in _STEP_US if expected_m <= m)]
    able = {config: step for config, step in of_rows.items() if not fused or config.tiles % 2 == 0}
    return {_that_fits(config, experts): step for config, step in able.items()}


@functools.lru_cache(64)
def _draw_counts(experts: int, rows: int) -> np.ndarray:
    """Random numbers of rows per expert, [64 draws, experts]."""
    return np.random.default_rng(0).multinomial(rows, np.full(experts, 1 / experts), 64)


def dense(k: int, n: int, rows: float | int) -> TuningConfig:
    """The configuration with the least predicted time (`_DENSE_STEP_US`) for one expert, a single matrix [n, k]."""

    def us(config: TuningConfig) -> float:
        tasks = math.ceil(rows / max(config.tile_m)) * -(-n // (TILE * config.tiles))
        return -(-tasks // H100_SMS) * -(-k // TILE) * _DENSE_STEP_US[config]

    return min(_DENSE_STEP_US, key=us)


def rule_of_thumb(k: int, expected_m: float | int) -> TuningConfig:
    """Tuned for many rows: tile_m reaches to about two standard deviations above the expected number of rows."""
    if expected_m <= 96:
        return TuningConfig((48, 64, 80, 96), warpgroups=4, k_tiles=2, num_stages=4, in_flight=0)
    if expected_m <= 512:
        return TuningConfig((64, 144), k_tiles=2, num_stages=4)
    if k >= 4096:
        return TuningConfig((64, 256), num_stages=4, unroll=2, own_store=False)
    return TuningConfig((64, 128, 192), k_tiles=2, num_stages=3)


def _that_fits(config: TuningConfig, experts: int) -> TuningConfig:
    """The configuration with fewer stages, if shared memory is too small for it (the plan grows with the experts)."""
    while config.num_stages > 2 and config.smem_bytes(experts) > SMEM_BYTES:
        config = dataclasses.replace(config, num_stages=config.num_stages - 1)
    return config


def _few(tile_m: tuple[int, ...], warpgroups: int, row_tiles: int = 1, *, in_flight: int) -> TuningConfig:
    """A configuration with at most eight stages; `_that_fits` reduces them to what shared memory holds."""
    return TuningConfig(tile_m, warpgroups, row_tiles, k_tiles=4, num_stages=8, in_flight=in_flight)


# The model of `few_rows`, fitted to experiments/results/h100/gemm_few_rows.json; experiments/results/gemm_log.md tells
# how. A task takes _STEP_US microseconds per tile of K while every SM of an H100 has a task, and _TASK_US per weight
# tile in addition. The keys of _STEP_US are the most rows per expert that the numbers below them are for.
_TASK_US = 0.3
_WORTH_IT = 1.04  # the model must promise this speedup to replace the first configuration: about its own error
_STEP_US: dict[int, dict[TuningConfig, float]] = {
    8: {
        _few((8, 16), 4, in_flight=0): 0.404,
        _few((8, 16), 3, in_flight=0): 0.307,
        _few((8, 16), 3, 2, in_flight=1): 0.570,
        _few((8, 16), 2, in_flight=1): 0.233,
    },
    16: {
        _few((16, 24, 32), 4, in_flight=0): 0.400,
        _few((16, 24, 32), 3, in_flight=0): 0.306,
        _few((16, 24, 32), 3, 2, in_flight=1): 0.611,
        _few((16, 24, 32), 2, in_flight=1): 0.226,
    },
    32: {
        _few((24, 32, 40, 48), 4, in_flight=0): 0.466,
        _few((24, 32, 40, 48), 3, in_flight=0): 0.347,
        _few((24, 32, 40, 48), 3, 2, in_flight=1): 0.724,
        _few((24, 32, 40, 48), 2, in_flight=1): 0.261,
    },
    56: {
        _few((40, 48, 56, 64), 4, in_flight=0): 0.495,
        _few((40, 48, 56, 64), 3, in_flight=0): 0.364,
        _few((40, 48, 56, 64), 3, 2, in_flight=1): 0.896,
        _few((40, 48, 56, 64), 2, in_flight=1): 0.269,
    },
}
MOST_FEW_ROWS = max(_STEP_US)
# The model of `dense`: microseconds of a task per tile of K, everything included (experiments/results/dense_log.md).
_DENSE_STEP_US = {
    TuningConfig((8, 16, 24, 32), warpgroups=1, k_tiles=8, num_stages=4): 0.165,
    TuningConfig((64,), warpgroups=1, k_tiles=4, num_stages=4): 0.195,
    TuningConfig((128,), warpgroups=1, k_tiles=2): 0.245,
    TuningConfig((128,), k_tiles=2, num_stages=3): 0.379,
    TuningConfig((64, 256), num_stages=4, unroll=2, own_store=False): 0.652,
}


def shape_key(experts: int, k: int, n: int, fused: bool) -> str:
    """Key of a shape in the table."""
    return f"{'swiglu ' if fused else ''}{experts}x{k}x{n}"


def parse_key(key: str) -> tuple[int, int, int, bool]:
    """Inverse of `shape_key`: experts, K, N, and whether SwiGLU is fused."""
    experts, k, n = (int(size) for size in key.removeprefix("swiglu ").split("x"))
    return experts, k, n, key.startswith("swiglu ")


def from_fields(fields: dict[str, Any]) -> TuningConfig:
    """The configuration with these fields, as JSON stores them."""
    values: dict[str, Any] = {**fields, "tile_m": tuple(fields["tile_m"])}
    return TuningConfig(**values)


def save(experts: int, k: int, n: int, m: int, config: TuningConfig, *, fused: bool = False) -> None:
    """Sets one entry of the table and writes the file."""
    table = json.loads(TABLE.read_text()) if TABLE.exists() else {}
    table.setdefault(shape_key(experts, k, n, fused), {})[str(m)] = dataclasses.asdict(config)
    table = {key: dict(sorted(rows.items(), key=lambda row: int(row[0]))) for key, rows in sorted(table.items())}
    TABLE.write_text(json.dumps(table, indent=1) + "\n")
    _table.cache_clear()


@functools.cache
def _table() -> dict[tuple[int, int, int, bool], dict[int, TuningConfig]]:
    table = json.loads(TABLE.read_text())
    return {parse_key(key): {int(m): from_fields(f) for m, f in by_m.items()} for key, by_m in table.items()}

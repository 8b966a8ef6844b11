"""The grouped GEMM's kernel without a GPU: its plan in interpret mode, refusals, tuning, lowering for CUDA.

A wgmma whose operand is in registers does not run in interpret mode; products are tested on a GPU.
"""

import dataclasses
import functools
import json
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cuda_lowering import kernels_in, struct
from fp4jax.grouped_gemm import (
    PackedWeights,
    contiguous_grouped_gemm,
    gemm,
    grouped_gemm_swiglu,
    masked_grouped_gemm,
)
from fp4jax.moe import MoEConfig, MoEWeights, moe_layer
from fp4jax.nvfp4 import NVFP4Tensor
from pallas_kernels.gemm import choice, grouped_gemm as gemm_kernel
from pallas_kernels.gemm.config import TuningConfig
from pallas_kernels.gemm.tasks import _ROTATION, GroupTiles
from pallas_kernels.simt import lanes, launch
from pallas_kernels.simt.hardware import SMEM_BYTES

BLOCKS = 3  # of a grid in interpret mode
CLOSE = TuningConfig((64, 176), k_tiles=2, num_stages=9)

pytestmark = pytest.mark.usefixtures("on_the_cpu")


# --- the plan ---


def expected_tasks(counts, max_rows, tile_m, columns, contiguous):
    """(expert, column, first row, rows) in order, one expert after the other."""
    tasks, start = [], 0
    for expert, count in enumerate(counts):
        rows = min(max(count, 0), max_rows)
        if contiguous:
            rows, first, start = min(rows, max_rows - start), start, min(start + rows, max_rows)
        else:
            first = expert * max_rows
        for offset in range(0, rows, tile_m):
            tasks += [(expert, c, first + offset, min(tile_m, rows - offset)) for c in range(columns)]
    return tasks


@pytest.mark.parametrize("contiguous", [False, True])
@pytest.mark.parametrize(
    "counts",
    [
        pytest.param([5, 0, 17, 8], id="some"),
        pytest.param([-3, 2**30, 1], id="out of range"),
        pytest.param([0] * 128 + [9, 0, 3], id="late"),
        pytest.param([0, 0, 0], id="none", marks=pytest.mark.slow),
        pytest.param([40], id="one", marks=pytest.mark.slow),
        pytest.param([1] * 130, id="many", marks=pytest.mark.slow),
    ],
)
def test_every_row_of_every_expert_is_one_task_per_column_tile(counts, contiguous, interpret):
    max_rows, columns = 40, 2
    plan = GroupTiles(len(counts), max_rows, 16, contiguous, BLOCKS)
    wanted = expected_tasks(counts, max_rows, 16, columns, contiguous)
    most = -(-max(1, len(wanted)) // BLOCKS) + 1

    def body(counts_ref, tasks_ref, plan_ref):
        plan.fill(counts_ref, plan_ref)

        def record(task):
            row = tasks_ref.at[lanes.block_index(), task.number]
            for i, value in enumerate((*task[:4], 1 + task.is_last.astype(jnp.int32))):
                row[i] = value

        plan.for_each(plan_ref, columns, record)

    (tasks,) = launch.kernel(
        body, (struct((BLOCKS, most, 5), jnp.int32),), grid=BLOCKS, scratch_types=[plan.scratch()], interpret=interpret
    )(jnp.asarray(counts, jnp.int32))
    tasks = np.asarray(tasks)
    for block in range(BLOCKS):
        mine = [
            wanted[index]
            for number in range(most)
            if (index := number * BLOCKS + (block + number * _ROTATION) % BLOCKS) < len(wanted)
        ]
        np.testing.assert_array_equal(tasks[block, : len(mine), :4], np.reshape(mine, (-1, 4)))
        assert list(tasks[block, : len(mine), 4]) == [1] * (len(mine) - 1) + [2] * bool(mine)


# --- what is accepted ---

TUNED = [
    (choice.parse_key(key), int(m), choice.from_fields(fields))
    for key, by_m in json.loads(choice.TABLE.read_text()).items()
    for m, fields in by_m.items()
]


def operands(experts=8, m=64, n=512, k=256, per_row=False):
    return (
        struct((experts, m, k), jnp.bfloat16),
        struct((experts, n // 64, k // 64, 9, 64), jnp.uint32),
        struct((experts, n if per_row else 1), jnp.float32),
        struct((experts,), jnp.int32),
    )


@pytest.mark.parametrize(
    "change, word",
    [
        (dict(tile_m=()), "tile_m"),
        (dict(tile_m=(12,)), "tile_m"),
        (dict(tile_m=(64, 32)), "tile_m"),
        (dict(tile_m=(264,)), "tile_m"),
        (dict(warpgroups=5), "warpgroups"),
        (dict(row_tiles=0), "row_tiles"),
        (dict(num_stages=1), "num_stages"),
        (dict(k_tiles=17), "k_tiles"),
        (dict(unroll=0), "unroll"),
        (dict(warpgroups=0), "warpgroups"),
        (dict(in_flight=2), "in_flight"),
        (dict(k_tiles=1, row_tiles=1, unroll=1), "in_flight=1 needs"),
        (dict(tile_m=(256,)), "registers"),
        (dict(num_stages=40), "num_stages"),
        (dict(num_stages=20), "shared memory"),
        (dict(tile_m=(0, 64)), "tile_m"),
    ],
)
def test_configs_that_cannot_run_are_refused(change, word):
    config = dataclasses.replace(TuningConfig((64,), k_tiles=2), **change)
    assert word in gemm_kernel.check_config(*operands(), config=config)
    with pytest.raises(NotImplementedError, match=word.split()[0]):
        jax.eval_shape(lambda *a: gemm_kernel.grouped_gemm(*a, config=config), *operands())


@pytest.mark.parametrize(
    "index, bad, word",
    [
        (0, struct((8, 64, 256), jnp.float32), "bfloat16"),
        (0, struct((8, 64, 192), jnp.bfloat16), "K = 256"),
        (0, struct((7, 64, 256), jnp.bfloat16), "E = 8"),
        (0, struct((8, 0, 256), jnp.bfloat16), "empty"),
        (1, struct((8, 8, 4, 9, 64), jnp.int32), "uint32"),
        (2, struct((8, 2), jnp.float32), "w_scale"),
        (3, struct((7,), jnp.int32), "counts"),
    ],
)
def test_operands_that_do_not_fit_are_refused(index, bad, word):
    args = list(operands())
    args[index] = bad
    assert word in gemm_kernel.check_config(*args)


def test_scales_and_sizes_that_do_not_fit_are_refused():
    assert "x_scale" in gemm_kernel.check_config(*operands(), struct((8, 64, 1), jnp.float32))
    assert gemm_kernel.check_config(*operands(), struct((512, 1), jnp.float32)) is None
    assert "32-bit" in gemm_kernel.check_config(*operands(experts=128, m=2**20))


def test_the_estimate_of_shared_memory_is_not_too_small():
    """Configurations just below the limit lower; Mosaic GPU refuses what does not fit."""
    for config, experts in ((TuningConfig((40,), 1, k_tiles=1, num_stages=29, in_flight=0), 700), (CLOSE, 130)):
        while config.smem_bytes(experts) > SMEM_BYTES:
            config = dataclasses.replace(config, num_stages=config.num_stages - 1)
        assert gemm_kernel.check_config(*operands(experts), config=config) is None
        assert kernels_in(lambda *a, c=config: gemm_kernel.grouped_gemm(*a, config=c), *operands(experts)) == 1


def test_so_many_experts_that_no_configuration_fits_run_on_xla():
    x, words, _, counts = operands(9000, 8, 512, 256)
    w = PackedWeights(words, struct((9000, 1, 1), jnp.float32))
    assert kernels_in(lambda *a: masked_grouped_gemm(*a, expected_m=600), x, w, counts) == 0


def test_the_hint_chooses_the_configuration():
    x, words, _, _ = operands(8, 4096, 1536, 2048)
    w = PackedWeights(words, struct((8, 1, 1), jnp.float32))
    for m in (1, 16, 1024):
        assert gemm.kernel_config(x, w, m) == choice.choose(2048, 1536, 8, m)
        assert gemm.kernel_config(x, w, m, fused=True) == choice.choose(2048, 1536, 8, m, fused=True)
    assert gemm.kernel_config(x, w, None) == choice.choose(2048, 1536, 8, 2048)
    rows = struct((8 * 64, 2048), jnp.bfloat16)
    assert gemm.kernel_config(rows, w, None) == choice.choose(2048, 1536, 8, 64)


@pytest.mark.slow
def test_moe_layer_hands_on_the_usual_rows_per_expert(monkeypatch):
    hints = []
    real = gemm.kernel_config
    choose = lambda x, w, m, **fused: hints.append(m) or real(x, w, m, **fused)  # noqa: E731
    monkeypatch.setattr(gemm, "kernel_config", choose)
    pack = lambda n, k: PackedWeights(struct((4, n // 64, k // 64, 9, 64), jnp.uint32), struct((4, 1, 1), jnp.float32))  # noqa: E731
    weights = MoEWeights(pack(256, 128), pack(128, 128), jnp.float32(0.01), jnp.full((4, 1, 1), 0.01))
    x, ids, topk = struct((96, 128), jnp.bfloat16), struct((96, 2), jnp.int32), struct((96, 2), jnp.float32)
    kernels = kernels_in(lambda *a: moe_layer(*a, MoEConfig(num_experts=4)), x, ids, topk, weights)
    assert hints == [48, 48]  # once per GEMM
    assert kernels == 6  # quantize, metadata, rows, GEMM 1, GEMM 2, depermute


def test_swiglu_wants_halves_and_a_scale():
    assert "out must be" in gemm_kernel.check_config(*operands(), out="fp8")
    assert "array as act_scale" in gemm_kernel.check_config(*operands(), out="nvfp4")
    assert "array as act_scale" in gemm_kernel.check_config(*operands(), out="nvfp4", act_scale="per_token")
    assert "multiple of 64" in gemm_kernel.check_config(*operands(n=576), out="bf16")
    odd = TuningConfig((64,), warpgroups=3, k_tiles=2)
    assert "even" in gemm_kernel.check_config(*operands(), out="bf16", config=odd)


# --- tuning ---


@hypothesis.given(
    k=st.sampled_from([64, 768, 2048, 2560, 7168, 8192]),
    n=st.sampled_from([64, 192, 1536, 7168, 16384]),
    experts=st.sampled_from([1, 8, 160, 513, 2000]),
    m=st.floats(0, 1e5),
    fused=st.booleans(),
)
def test_every_choice_can_run(k, n, experts, m, fused):
    config = choice.choose(k, n, experts, m, fused=fused)
    args = operands(experts, 4, 2 * n if fused else n, k)
    assert gemm_kernel.check_config(*args, out="bf16" if fused else None, config=config) is None


def test_what_was_tuned_is_chosen_where_it_was_tuned(monkeypatch):
    for (experts, k, n, fused), m, config in TUNED:
        assert choice.choose(k, n, experts, m, fused=fused) == config
    few, tuned = TuningConfig((16,), 1, in_flight=0), {m: TuningConfig((m,)) for m in (64, 72, 80, 88)}
    table = {(64, 128, 256, False): {4: few, 64: tuned[64], 256: tuned[72]}, (8, 128, 256, False): {512: tuned[80]}}
    monkeypatch.setattr(choice, "_table", lambda: table)
    choose = functools.partial(choice.choose, 128, 256)
    assert choose(64, 3.5) == choose(64, 5) == few
    assert choose(64, 12) == choice.few_rows(128, 256, 64, 12, fused=False)  # neither 4 nor 64 rows
    assert choose(60, 4) == choice.few_rows(128, 256, 60, 4, fused=False)  # not the number of experts
    assert choose(64, 140) == choose(48, 140) == tuned[72]  # many rows: of the nearest number of experts, nearest m
    assert choose(64, 100) == tuned[64] and choose(6, 100) == choose(16, 9999) == tuned[80]
    assert choice.choose(128, 192, 64, 100) == choice.rule_of_thumb(128, 100)


_RESULTS = Path(__file__).resolve().parents[2] / "experiments" / "results" / "h100"
MEASURED = json.loads((_RESULTS / "gemm_few_rows.json").read_text())["rows"]


@pytest.mark.parametrize("cell", MEASURED, ids=lambda cell: f"{cell['experts']}x{cell['k']}x{cell['n']} m={cell['m']}")
def test_few_rows_choose_what_was_measured_to_be_fast(cell):
    """At most 5% more than the fastest of some fifteen configurations that ran on an H100, the table included."""
    us = {choice.from_fields(run["config"]): run["us"] for run in cell["runs"]}
    config = choice.choose(cell["k"], cell["n"], cell["experts"], cell["m"], fused=cell["fused"])
    assert us[config] <= 1.05 * min(us.values())


def test_the_model_of_few_rows_is_good_without_the_table():
    behind = []
    for cell in MEASURED:
        us = {choice.from_fields(run["config"]): run["us"] for run in cell["runs"]}
        config = choice.few_rows(cell["k"], cell["n"], cell["experts"], cell["m"], fused=cell["fused"])
        behind.append(us[config] / min(us.values()))
    assert np.mean(behind) < 1.02 and max(behind) < 1.13


def test_few_rows_count_waves_of_tasks():
    """32 experts have 128 tasks of six weight tiles, one wave, but 192 of four; 22 have one wave of either."""
    shape = dict(k=2048, n=1536, expected_m=4, fused=True)
    assert choice.few_rows(**shape, experts=32).tiles == 6
    assert choice.few_rows(**shape, experts=22).tiles == 4


def test_few_rows_take_what_two_waves_half_of_the_time_cost():
    """131.4 tasks expected of six tiles, on 132 SMs: in half of the draws there are two waves."""
    assert choice.few_rows(8192, 7168, 8, 2, fused=True).tiles == 2


# --- lowering ---


# Each configuration once, for one of its shapes, with and without SwiGLU.
DISTINCT = {(config, fused): (n, k) for (_, k, n, fused), _, config in TUNED} | {
    (choice._that_fits(config, 64), fused): (384, 2560)
    for by_config in choice._STEP_US.values()
    for config in by_config
    for fused in (False, True)[: 2 - config.tiles % 2]
}


@pytest.mark.slow
@pytest.mark.parametrize("config, fused", DISTINCT, ids=str)
def test_every_tuned_config_lowers(config, fused):
    n, k = DISTINCT[config, fused]

    def call(x, w, s, c, *act):
        options = dict(out="nvfp4", act_scale=act[0]) if fused else {}
        return gemm_kernel.grouped_gemm(x, w, s, c, config=config, **options)

    act = (struct((4, 1, 1), jnp.float32),) if fused else ()
    assert kernels_in(call, *operands(4, 300, n, k, per_row=True), *act) == 1


@pytest.mark.parametrize(
    ("layout", "x_scale"),
    [
        ("masked", "one"),
        pytest.param("contiguous", "row", marks=pytest.mark.slow),
        pytest.param("masked", "row", marks=pytest.mark.slow),
        pytest.param("contiguous", "one", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("out", [None, pytest.param("bf16", marks=pytest.mark.slow), "nvfp4",
                                 pytest.param("nvfp4_as_bf16", marks=pytest.mark.slow)])  # fmt: skip
def test_ops_take_the_kernel_by_default_on_a_hopper_gpu(layout, x_scale, out):
    experts, m, n, k = 3, 5, 384, 192  # no multiples of a task's columns, nor of a stage
    lead = (experts, m) if layout == "masked" else (experts * m,)
    x = struct((*lead, k), jnp.bfloat16)
    w = PackedWeights(struct((experts, n // 64, k // 64, 9, 64), jnp.uint32), struct((experts, n, 1), jnp.float32))
    counts = struct((experts,), jnp.int32)
    scale = struct((*lead, 1) if x_scale == "row" else (), jnp.float32)
    gemm = masked_grouped_gemm if layout == "masked" else contiguous_grouped_gemm

    def call(x, w, counts, scale):
        if out is None:
            return gemm(x, w, counts, x_scale=scale)
        return grouped_gemm_swiglu(x, w, counts, x_scale=scale, global_scale=jnp.float32(0.01), out=out)

    assert kernels_in(call, x, w, counts, scale) == 1


def test_a_scale_per_token_runs_one_kernel_after_the_other():
    x, words, _, counts = operands()
    w = PackedWeights(words, struct((8, 1, 1), jnp.float32))
    assert kernels_in(lambda x, w, c: grouped_gemm_swiglu(x, w, c, global_scale="per_token"), x, w, counts) == 2


def test_what_the_kernel_refuses_runs_on_xla_unless_it_was_named():
    x, words, _, counts = operands()
    w = PackedWeights(words, struct((8, 1, 1), jnp.float32))
    for options in (dict(out_dtype=jnp.float32), dict(x=struct(x.shape, jnp.float32))):
        given = options.pop("x", x)
        assert kernels_in(lambda x, w, c, o=options: masked_grouped_gemm(x, w, c, **o), given, w, counts) == 0
        with pytest.raises(NotImplementedError, match="bfloat16"):
            kernels_in(
                lambda x, w, c, o=options: masked_grouped_gemm(x, w, c, implementation="mosaic_gpu", **o),
                given, w, counts,
            )  # fmt: skip
    dense = struct((8, 512, 256), jnp.bfloat16)
    assert kernels_in(masked_grouped_gemm, x, dense, counts) == 0
    with pytest.raises(NotImplementedError, match=r"compute capability 9\.0"):
        jax.eval_shape(lambda x, w, c: masked_grouped_gemm(x, w, c, implementation="mosaic_gpu"), x, w, counts)


def test_unpacked_weights_are_packed_inside_the_call():
    x, _, _, counts = operands()
    w = NVFP4Tensor(
        struct((8, 512, 128), jnp.uint8), struct((8, 512, 16), jnp.float8_e4m3fn), struct((8, 1, 1), jnp.float32)
    )
    assert kernels_in(lambda x, w, c: masked_grouped_gemm(x, w, c, implementation="mosaic_gpu"), x, w, counts) == 1
    assert kernels_in(masked_grouped_gemm, x, w, counts) == 0  # None leaves them to XLA

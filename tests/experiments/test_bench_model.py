"""bench_model: the script with a tiny model, floors by hand, stages of kernels and scopes, rows of a peer, a table."""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from python_runs import ROOT, run_python
from refusals import check_refusals

from experiments.cases import model_compile, model_rows, models as model_cases, rank_calls
from experiments.cases.model_calls import filled_cache, serve
from experiments.cases.model_floors import Work, attention_sizes, experts_hit, floor_us, layer_sizes
from experiments.cases.model_timing import EXCHANGE
from experiments.harness import timing
from experiments.harness.cold_start import starts
from experiments.harness.model_report import model_text
from experiments.harness.model_stages import STAGES, by_kernel_name, by_scope, scoped_layers, stage_of_kernel
from experiments.harness.tables.models import model_table
from fp4jax.models import configure_experts
from fp4jax.sharded_moe import expert_mesh

pytestmark = pytest.mark.usefixtures("quick_compile")

COLUMNS = [
    "model", "layers", "phase", "implementation", "experts", "dense", "ranks", "requests", "tokens", "context",
    "us_per_layer", "kernel_us_per_layer", "kernels_per_layer", "in_graph", "tokens_per_s", "floor_us_per_layer",
    "percent_of_floor", "peak_gb", "weights_gb", "cache_gb", "wire_format", "stages", "seconds", "seconds_from_cache",
    "seconds_from_store", "programs", "cache", "page_size", "exchange_us_per_layer", "wall_over_kernels",
]  # fmt: skip


@pytest.mark.slow
def test_the_script_measures_a_tiny_model(tmp_path):
    """A prefill in three chunks and a decode step; every column is there, and every stage has time."""
    few = ["--layers=1", "--prefill=20", "--chunk=8", "--decode=2", "--contexts=12", "--repeats=1"]
    arguments = [*few, "--nocompile", "--experts=w4a16", "--dense=bf16", f"--output_dir={tmp_path}"]
    settings = {"jax_disable_most_optimizations": True}
    done = run_python(ROOT / "experiments" / "bench_model.py", *arguments, settings=settings)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "bench_model.json").read_text())
    prefill, decode = report["rows"]
    for row in report["rows"]:
        assert list(row) == COLUMNS == list(model_rows.COLUMNS)
        assert (row["model"], row["layers"], row["implementation"], row["ranks"]) == ("tiny", 1, "fp4jax", 1)
        assert (row["experts"], row["dense"], row["wire_format"]) == ("w4a16", "bf16", None)
        assert row["us_per_layer"] > 0 and row["tokens_per_s"] > 0 and row["floor_us_per_layer"] > 0
        assert 0 < row["percent_of_floor"] < 100
        assert list(row["stages"]) == list(STAGES) and min(row["stages"].values()) > 0, row["stages"]
        assert row["kernel_us_per_layer"] is row["in_graph"] is None  # of a GPU
        assert (
            row["seconds"] is row["seconds_from_cache"] is row["seconds_from_store"] is row["programs"] is None
        )  # of compiling
        assert row["cache"] == "compute" and row["page_size"] == 64
    assert (prefill["phase"], prefill["requests"], prefill["tokens"], prefill["context"]) == ("prefill", 1, 20, None)
    assert (decode["phase"], decode["requests"], decode["tokens"], decode["context"]) == ("decode", 2, None, 12)
    assert (tmp_path / "bench_model.png").read_bytes().startswith(b"\x89PNG")
    assert "transformers is not measured: " in done.stdout
    assert "20 tokens" in done.stdout and "2 x 12" in done.stdout and "projections" in done.stdout
    assert model_table(report).count("\n") == 3


@pytest.mark.slow
def test_the_script_measures_two_devices(tmp_path):
    few = ["--layers=1", "--prefill=20", "--chunk=8", "--decode=2", "--contexts=12", "--repeats=1"]
    arguments = [*few, "--nocompile", "--ranks=1,2", "--wire_formats=bf16", f"--output_dir={tmp_path}"]
    settings = {"jax_disable_most_optimizations": True, "jax_num_cpu_devices": 2}
    done = run_python(ROOT / "experiments" / "bench_model.py", *arguments, settings=settings)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads((tmp_path / "bench_model.json").read_text())["rows"]
    assert [(r["phase"], r["ranks"], r["wire_format"], r["requests"]) for r in rows] == [
        ("prefill", 1, None, 1), ("decode", 1, None, 2), ("prefill", 2, "bf16", 1), ("decode", 2, "bf16", 2),
    ]  # fmt: skip
    for row in rows:
        assert list(row) == COLUMNS and row["us_per_layer"] > 0 and min(row["stages"].values()) > 0
    assert rows[2]["floor_us_per_layer"] > 0 and rows[3]["cache_gb"] == rows[1]["cache_gb"]
    assert "2 x 20 tokens" in done.stdout and "2 x 2 x 12" in done.stdout


@pytest.mark.slow
def test_calls_on_two_devices_compute_what_one_device_does(make_mesh):
    """Prompts in chunks, of one device each, and what follows them."""
    model = model_cases.random_model(model_cases.model_config("tiny", 2), "w4a16", "bf16")
    vocabulary = model.config.vocab_size
    served = serve(model, requests=1, tokens=21, bucket=8, page_size=8, compiler_options=None)
    ids = np.random.default_rng(0).integers(0, vocabulary, (2, 3, 8)).reshape(2, 24)[:, :20]
    expected = [int(np.argmax(served.prefill(prompt.tolist()).logits)) for prompt in ids]
    mesh = expert_mesh(make_mesh(2))
    configure_experts(model, mesh=mesh, wire_format="bf16", form="per_slot")
    calls = rank_calls.prefill_calls(model, 20, 8, 8, None, mesh=mesh)
    np.testing.assert_array_equal(calls.whole.run(), expected)
    assert [number for number, _ in calls.ends] == [1] and len(calls.executables()) == 3
    calls = rank_calls.decode_calls(model, 2, 12, 3, 8, None, mesh=mesh)
    calls.whole.restart()
    first = calls.whole.run()
    assert first.shape == (4, 3) and (np.asarray(first) >= 0).all()
    calls.whole.restart()
    np.testing.assert_array_equal(calls.whole.run(), first)
    assert (calls.ends[0][1].run() >= 0).all() and calls.steps == 3


@pytest.mark.slow
def test_the_script_measures_compiling(tmp_path):
    """Of three processes the second finds every program of a tiny model in JAX's cache, the third in a store."""
    arguments = ["--layers=1", "--prefill=", "--decode=", f"--output_dir={tmp_path}"]
    environment = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "true"}
    done = run_python(ROOT / "experiments" / "bench_model.py", *arguments, environment=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    (row,) = json.loads((tmp_path / "bench_model.json").read_text())["rows"]
    assert list(row) == COLUMNS
    names = {"model": "tiny", "layers": 1, "phase": "compile", "implementation": "fp4jax"}
    names |= {"experts": "w4a16", "dense": "bf16", "ranks": 1, "programs": 8}  # two each of four kinds
    assert {name: value for name, value in row.items() if value is not None}.keys() - names.keys() == {
        "seconds", "seconds_from_cache", "seconds_from_store",
    }  # fmt: skip
    assert names.items() <= row.items() and 0 < row["seconds_from_store"] < row["seconds_from_cache"] < row["seconds"]
    assert "s to compile 8 programs" in done.stdout and "s to make the weights" in done.stdout
    assert "all programs" in done.stdout and "from JAX's compilation cache" in done.stdout
    assert not (tmp_path / "bench_model.png").exists()


def test_a_start_that_fails_is_noted(monkeypatch):
    monkeypatch.setattr(model_compile, "starts", lambda *_: starts([sys.executable, "-c", "raise SystemExit(3)"]))
    columns, about = model_compile.compile_columns("tiny", 1, "w4a16", "bf16")
    assert columns == {"error": "failed: start 1 ended with status 3"}
    row = model_rows.make_compile_row("tiny", 1, "w4a16", "bf16") | columns
    assert model_rows.with_floors([row], timing.Ceilings(1e12, 1e15)) == [row]
    assert "status 3" in about and "failed: start 1" in model_text([row])


@pytest.mark.slow
def test_starts_share_a_new_cache():
    code = """
import json, jax
jax.jit(lambda x: x + 1)(1.0)
folder = jax.config.jax_compilation_cache_dir
import os; print(json.dumps([folder, len(os.listdir(folder))]))
"""
    (first, count), (second, later) = starts(*[[sys.executable, "-c", code]] * 2)
    assert first == second and 0 < count == later  # the second start has stored nothing


def test_bad_flags_are_refused():
    check_refusals(
        "bench_model",
        {
            ("--models=qwen4",): "--models: ['qwen4'] unknown",
            ("--experts=w8a8",): "--experts: ['w8a8'] unknown",
            ("--dense=int4",): "--dense: ['int4'] unknown",
            ("--wire_formats=int4",): "--wire_formats: ['int4'] unknown",
            ("--ranks=0",): "--ranks must be positive, got 0",
            ("--ranks=1,512",): "--ranks=512: JAX sees 1 devices",
            ("--page_size=0",): "--page_size",
            ("--peers=other",): "--peers: ['other'] unknown",
            ("--prefill=0",): "--prefill must be positive, got 0",
            ("--decode=x",): "--decode: invalid literal",
            ("--prefill=", "--decode=", "--nocompile"): "leave nothing to measure",
            ("--models=qwen3-30b", "--layers=49"): "--layers=49: qwen3-30b has 48",
            ("--models=qwen3-30b", "--contexts=40940"): "need 40965 positions, qwen3-30b has 40960",
            ("--layers=0",): "--layers",
            ("--peer_layers=0",): "--peer_layers",
            ("stray",): "unexpected arguments",
        },
    )


def test_experts_that_do_not_divide_by_the_devices_are_refused():
    script = ROOT / "experiments" / "bench_model.py"
    done = run_python(script, "--ranks=3", "--nocompile", settings={"jax_num_cpu_devices": 3})
    assert done.returncode == 1 and "--ranks=3 does not divide the experts of tiny" in done.stderr


_WITHOUT_MEMORY = """
import json
import jax, jax.numpy as jnp
from absl import flags
from experiments import bench_model as script

flags.FLAGS([script.__name__])
script.decode_calls = lambda *_: jax.jit(lambda: jnp.zeros(1 << 50, jnp.uint8))()
print(json.dumps(script.measured(None, script.Work("decode", 2, context=8))))
"""


def test_what_does_not_fit_into_memory_is_noted():
    done = run_python("-c", _WITHOUT_MEMORY)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert list(found) == ["error"] and found["error"].startswith("out of memory: ")


# --- sizes and floors ---


def test_published_sizes():
    """The parameters of both small models as their names say, and what stays of the layers of a model that is cut."""
    for name, layers, billions in (("qwen3-30b", 48, 30.5), ("ernie-21b", 28, 21.8)):
        model = model_cases.abstract_model(model_cases.model_config(name, layers))
        leaves = jax.tree.leaves(model_cases.nnx.state(model))
        assert sum(leaf.size for leaf in leaves) / 1e9 == pytest.approx(billions, rel=0.01)
    assert [model_cases.usual_layers(name) for name in ("qwen3-30b", "ernie-21b", "deepseek-v3")] == [48, 28, 3]
    for name in ("ernie-21b", "deepseek-v3"):
        config = model_cases.model_config(name, 3)
        assert all(map(config.is_moe_layer, range(3)))
    assert not model_cases.model_config("ernie-21b", 28).is_moe_layer(0)


def test_floors_by_hand():
    """A layer of Qwen3-30B: projections of 2048 x (2 x 4096 + 2 x 512), 128 experts of 3 x 2048 x 768, 8 per token."""
    model = model_cases.abstract_model(model_cases.model_config("qwen3-30b", 2))
    linear, router, expert = 2048 * (2 * 4096 + 2 * 512), 2048 * 128, 3 * 2048 * 768
    assert layer_sizes(model) == [(linear, router, expert, 128, 8)] * 2
    assert attention_sizes(model) == (2 * 2 * 4 * 128, 2 * 32 * 128, 2 * 32 * 128)
    assert experts_hit(128, 8, 1) == pytest.approx(8) and experts_hit(128, 8, 10_000) == pytest.approx(128)
    ceilings = timing.Ceilings(copy_bytes_per_s=1e12, bf16_flops=1e15)

    hit = 128 * (1 - (120 / 128) ** 32)
    in_decode = hit * expert * 9 / 16 + 2 * linear + 2 * router + 32 * 1025 * 1024 * 2
    found = floor_us(model, Work("decode", 32, context=1024), "w4a16", "bf16", ceilings)
    assert found == pytest.approx(in_decode / 1e6)
    half = in_decode + (128 * (1 - (120 / 128) ** 64) / 2 - hit) * expert * 9 / 16  # half of the experts, for 64 tokens
    found = floor_us(model, Work("decode", 32, context=1024), "w4a16", "bf16", ceilings, ranks=2)
    assert found == pytest.approx(half / 1e6)
    model.set_cache_dtype(jnp.float8_e4m3fn)
    found = floor_us(model, Work("decode", 32, context=1024), "w4a16", "bf16", ceilings)
    assert found == pytest.approx((in_decode - 32 * 1025 * 1024) / 1e6)
    model.set_cache_dtype(jnp.bfloat16)
    quantized = in_decode - 2 * linear + 9 / 16 * linear
    found = floor_us(model, Work("decode", 32, context=1024), "w4a4", "nvfp4", ceilings)
    assert found == pytest.approx(quantized / 1e6)
    bf16 = in_decode + hit * expert * (2 - 9 / 16)
    found = floor_us(model, Work("decode", 32, context=1024), "bf16", "bf16", ceilings)
    assert found == pytest.approx(bf16 / 1e6)

    tokens = 32768
    flops = 2 * tokens * (linear + router + 8 * expert) + 2 * 32 * 2 * 128 * tokens * (tokens + 1) / 2
    found = floor_us(model, Work("prefill", tokens=tokens), "w4a16", "bf16", ceilings)
    assert found == pytest.approx(flops / 1e9)


def test_floors_of_latent_attention_and_of_dense_layers():
    latent = model_cases.abstract_model(model_cases.model_config("deepseek-v3", 1))
    assert attention_sizes(latent) == (2 * (512 + 64), 128 * (192 + 128), 128 * (2 * 512 + 64))
    (sizes,) = layer_sizes(latent)
    projections = 7168 * (1536 + 576 + 16384) + 1536 * 128 * 192 + 512 * 128 * 256
    assert sizes.linear == projections + 3 * 7168 * 2048 and sizes.router == 7168 * 256
    ernie = model_cases.abstract_model(model_cases.model_config("ernie-21b", 28))
    assert layer_sizes(ernie)[0] == (2560 * (2 * 2560 + 2 * 512) + 3 * 2560 * 12288, 0, 0, 0, 0)


# --- stages ---


@pytest.mark.parametrize(
    ("kernel", "stage"),
    [
        ("nvjet_tst_128x256_64x4_2x1_v_bz_coopA_TNT", "projections"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64", "projections"),
        ("void gemv2T_kernel_val<int, int, __nv_bfloat16>", "projections"),
        ("void pytorch_flash::flash_fwd_splitkv_kernel<Flash_fwd_kernel_traits<128>>", "attention"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_3", "attention"),
        ("fmha_cutlassF_bf16_aligned_64x128_rf_sm80", "attention"),
        ("void cutlass::device_kernel<at::cuda::detail::enable_3x_kernel<GroupProblemShape>>", "experts"),
        ("triton_poi_fused_mul_silu_0", "experts"),
        ("void at::native::sbtopk::gatherTopK<float, unsigned int>", "router"),
        ("void at::native::vectorized_elementwise_kernel<4, CUDAFunctor_add>", "rest"),
        ("Memcpy DtoD (Device -> Device)", "rest"),
    ],
)
def test_stages_of_kernel_names(kernel, stage):
    assert stage_of_kernel(kernel) == stage


def test_kernels_of_the_exchange():
    names = {
        "dispatch_Kernel_run_mosaic_gpu_kernel": True, "combine_mosaic_gpu_kernel": True,
        "push_combine_mosaic_gpu_kernel": True, "stream_executor::gpu::MultiGpuBarrierWithNcclKernelImpl(long": True,
        "ncclDevKernel_SendRecv(ncclDevKernelArgsStorage<4096ul>)": True,
        "depermute_depermute_combine_mosaic_gpu_kernel": False, "permute_scatter_rows_mosaic_gpu_kernel": False,
        "nvjet_sm90_tst_128x160_64x5_2x1_v_bz_TNT": False,
    }  # fmt: skip
    assert {name: bool(EXCHANGE.search(name)) for name in names} == names


def test_stages_are_per_layer():
    found = by_kernel_name({"nvjet_a": 30.0, "nvjet_b": 10.0, "flash_fwd": 8.0, "copy": 4.0}, layers=4)
    assert found == {"projections": 10.0, "attention": 2.0, "router": 0.0, "experts": 0.0, "rest": 1.0}
    scopes = {"experts": 6.0, "router": 3.0, "projections": 9.0, "attention": 12.0, "layer": 1.5, "other": 99.0}
    found = by_scope(scopes, layers=3)  # "other" is the embedding and the head
    assert found == {"projections": 3.0, "attention": 4.0, "router": 1.0, "experts": 2.0, "rest": 0.5}


def test_scopes_name_the_parts_of_a_layer_and_are_gone_afterwards():
    model = model_cases.abstract_model(model_cases.model_config("tiny", 1))
    graphdef, state = model_cases.nnx.split(model)
    ids = jax.ShapeDtypeStruct((1, 4), jnp.int32)

    def lowered():
        program = jax.jit(lambda state, ids: model_cases.nnx.merge(graphdef, state)(ids)).lower(state, ids)
        return program.as_text(debug_info=True)

    with scoped_layers():
        text = lowered()
    for scope in ("layer/attention/projections", "layer/router/experts", "layer/router/projections"):
        assert f"/{scope}/" in text
    assert "/layer/attention/" not in lowered()


# --- the model ---


@pytest.mark.slow
@pytest.mark.parametrize("dense", ["fp8", "nvfp4"])
def test_random_layers_differ_and_run_in_every_format(dense):
    model = model_cases.random_model(model_cases.model_config("tiny", 2), "w4a4", dense)
    first, second = (layer.mlp for layer in model.layers)
    assert first.config.activation_format_1 == first.config.activation_format_2 == "nvfp4"
    kinds = {"fp8": "BlockFP8Linear", "nvfp4": "NVFP4Linear"}
    assert type(model.layers[0].self_attn.q_proj).__name__ == kinds[dense]
    assert type(first.gate).__name__ == type(model.lm_head).__name__ == "Linear"
    assert not np.array_equal(first.gate.weight[...], second.gate.weight[...])
    assert not np.array_equal(first.w13.get_value().qdata, second.w13.get_value().qdata)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((1, 16, 64)), jnp.float32)
    y = jax.jit(lambda x: first(x)[0])(x)
    assert 0.1 < float(jnp.std(y)) < 10
    part = model_cases.last_layers(model, 1)
    assert part.layers[0].mlp.w2.get_value().qdata is second.w2.get_value().qdata and len(model.layers) == 2


@pytest.mark.slow
def test_a_filled_cache_is_random_and_finite():
    model = model_cases.random_model(model_cases.model_config("tiny", 1), "w4a16", "bf16")
    served = serve(model, requests=2, tokens=8, bucket=1, page_size=64, compiler_options=None)
    parts = jax.tree.leaves(filled_cache(served, 2, 4))
    assert all(np.isfinite(part).all() and np.std(part) > 0.5 for part in parts)
    assert not np.array_equal(*parts[:2])


# --- rows ---


def made_up_rows():
    """A prefill of fp4jax and of the peer in both ways, and a decode step that ran out of memory."""
    prefill, decode = Work("prefill", tokens=2048), Work("decode", 128, context=32768)
    ours = model_rows.make_row("qwen3-30b", 48, prefill, "fp4jax", "w4a16", "bf16")
    ours |= {"us_per_layer": 500.0, "kernel_us_per_layer": 480.25, "tokens_per_s": 85333.3, "peak_gb": 22.25}
    failed = model_rows.make_row("qwen3-30b", 48, decode, "fp4jax", "w4a16", "bf16")
    failed["error"] = "out of memory: RESOURCE_EXHAUSTED: Out of memory allocating"
    answers = [
        {"cell": list(prefill), "implementation": "transformers", "us_per_layer": 2000.0, "ends_us": 4000.0},
        {"cell": list(prefill), "implementation": "transformers compiled", "us_per_layer": 1500.0, "ends_us": 4000.0},
        {"cell": list(decode), "implementation": "transformers", "error": "failed: RuntimeError: no"},
    ]
    return [*model_rows.peer_rows("qwen3-30b", 8, 48, answers), ours, failed]


def test_rows_of_a_peer():
    eager, compiled, failed = model_rows.with_floors(made_up_rows()[:3], timing.Ceilings(1e12, 1e15))
    assert (eager["layers"], eager["experts"], eager["dense"], eager["requests"]) == (8, "bf16", "bf16", 1)
    assert eager["tokens_per_s"] == round(2048e6 / (48 * 2000 + 4000), 1)
    assert compiled["tokens_per_s"] == round(2048e6 / (48 * 1500 + 4000), 1)
    assert compiled["percent_of_floor"] == pytest.approx(100 * compiled["floor_us_per_layer"] / 1500, abs=0.1)
    assert set(eager) == set(COLUMNS) and set(failed) == {*COLUMNS, "error"}
    assert failed["us_per_layer"] is failed["percent_of_floor"] is None and failed["floor_us_per_layer"] > 0


def test_the_table_compares_with_the_faster_way_of_the_peer():
    rows = model_rows.with_floors(made_up_rows(), timing.Ceilings(1e12, 1e15))
    head, _, first, second = model_table({"rows": rows}).splitlines()
    assert head.startswith("| model | layers | experts | linear layers | phase | requests | tokens or context |")
    floor, percent = rows[3]["floor_us_per_layer"], rows[3]["percent_of_floor"]
    cells = ["qwen3-30b", "48", "w4a16", "bf16", "prefill", "1", "2048", "500", "480", f"{floor:.0f}"]
    cells += [f"{percent:.0f}", "1500", "3.00x", "85333", "22.2"]
    assert first == f"| {' | '.join(cells)} |"
    assert "| decode | 128 | 32768 | out of memory |" in second
    text = model_text(rows)
    compiled = model_rows.make_compile_row("qwen3-30b", 48, "w4a16", "bf16")
    compiled |= {
        "seconds": 38.25,
        "seconds_from_cache": 14.5,
        "seconds_from_store": 3.25,
        "programs": 8,
        "peak_gb": 46.12,
    }
    assert model_table({"rows": [*rows, compiled]}) == model_table({"rows": rows})
    said = "38.2 s for 8 programs, 14.5 s from JAX's compilation cache, 3.2 s from a store, peak 46.1 GB"
    assert said in model_text([compiled]) and "all programs" in model_text([compiled])
    assert "128 x 32768" in text and "out of memory: RESOURCE_EXHAUSTED" in text and "failed: RuntimeError" in text

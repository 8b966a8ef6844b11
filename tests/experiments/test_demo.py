"""The demo end to end in a subprocess on a micro model and corpus, its table against its JSON, and its refusals."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from python_runs import ROOT, last_json, run_python
from refusals import check_refusals

from experiments.text.corpora import load_corpus
from fp4jax.checkpoint import save_model
from fp4jax.models.qwen3_moe import Qwen3Moe, Qwen3MoeConfig

HIDDEN = 64


def run_demo(*arguments):
    settings = {"jax_disable_most_optimizations": True}  # it compiles for longer than it runs
    return run_python(ROOT / "experiments" / "demo.py", *arguments, settings=settings, timeout=280)


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    config = Qwen3MoeConfig(
        vocab_size=256, hidden_size=HIDDEN, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        head_dim=32, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, initializer_range=0.2,
        tie_word_embeddings=True,
    )  # fmt: skip
    save_model(Qwen3Moe(config, rngs=nnx.Rngs(0)), config, folder / "model")
    (folder / "text").mkdir()
    for i in range(8):
        (folder / "text" / f"{i}.txt").write_text(f"the quick brown fox number {i} jumps over the lazy dog; " * 40)
    result = run_demo(
        f"--model={folder / 'model'}", f"--corpus={folder / 'text'}", f"--output_dir={folder / 'out'}",
        "--config.demo.sequence_length=64", "--config.demo.batch_size=2", "--windows=4", "--new_bytes=5",
        "--config.demo.calibration_windows=4",
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    return json.loads((folder / "out" / "demo.json").read_text()), result.stdout, folder / "out"


@pytest.mark.slow
def test_demo_table_plot_and_json(report):
    values, printed, folder = report
    names = [row["name"] for row in values["rows"]]
    wired = (f"W4A4 + nvfp4 wire, ep={n}" for n in (1, 2, 4))
    assert names == ["bf16", "bf16, cache in FP8", "W4A16", "W4A4", *wired]
    for row in values["rows"]:
        line = next(line for line in printed.splitlines() if line.startswith(f"{row['name']}  "))
        assert f"{row['bits_per_byte']:.4f}" in line
        assert row["dropped"] == 0
    assert (folder / "demo.png").read_bytes().startswith(b"\x89PNG")
    assert "continues the prompt" in printed
    note = values["inputs"]["text"]
    assert note in printed and values["inputs"]["corpus_digest"][:12] in note
    assert "held-out text: --corpus=" in note and "README's table is of another text, digest " in note
    assert values["sample"].startswith("def read_lines")


@pytest.mark.slow
def test_demo_formats_agree_in_quality(report):
    """Random weights are near 8 bits per byte and quantization noise hardly moves that; the wire adds rounding only."""
    bits = {row["name"]: row["bits_per_byte"] for row in report[0]["rows"]}
    assert all(abs(value / bits["bf16"] - 1) < 0.03 for value in bits.values())
    assert bits["bf16"] not in (bits["W4A16"], bits["bf16, cache in FP8"])
    assert bits["W4A4"] != bits["W4A16"]
    for n in (1, 2, 4):
        assert abs(bits[f"W4A4 + nvfp4 wire, ep={n}"] / bits["W4A4"] - 1) < 2e-3


@pytest.mark.slow
def test_demo_wire_bytes(report):
    """Worst-case buffers: every token has room on every other device. 2 slots of i32 id and f32 weight ride along."""
    for row in report[0]["rows"][3:]:
        others = row["ep"] - 1
        assert row["wire"] == {
            "dispatch": others * (HIDDEN / 2 + HIDDEN / 16 + 16),
            "combine": others * 2 * HIDDEN,
        }
        assert row["wire_bf16"] == {"dispatch": others * (2 * HIDDEN + 16), "combine": others * 2 * HIDDEN}


@pytest.mark.slow
def test_demo_times_every_stage(report):
    for row in report[0]["rows"][3:]:
        assert set(row["stages_us"]) == {
            "quantize", "dispatch", "permute", "gemm_1_swiglu", "gemm_2", "depermute", "combine", "other",
        }  # fmt: skip
        assert all(row["stages_us"][stage] > 0 for stage in ("quantize", "gemm_1_swiglu", "gemm_2"))
        if row["ep"] > 1:
            assert row["stages_us"]["dispatch"] > 0
            assert row["stages_us"]["combine"] > 0


def test_demo_refuses_bad_flags():
    check_refusals(
        "demo",
        {
            ("--model=/does/not/exist",): "--model=/does/not/exist holds no config.json",
            ("--corpus=/does/not/exist",): "no such folder",
            (f"--corpus={__file__}",): "this is a file, not a folder",
            ("--windows=0",): "--windows",
            ("--temperature=-1",): "--temperature",
            ("--prompt=",): "--prompt is empty",
            ("--new_bytes=3000",): "--new_bytes=3000",
            ("--temperature=inf",): "--temperature=inf",
            ("stray",): "unexpected arguments",
            ("--config=configs/none.py",): "there is no file configs/none.py",
            ("--wire=int8",): "Unknown command line flag 'wire'",
        },
    )


_FIRST_MEASUREMENT = """
import json, sys
from absl import app
from experiments import demo

def measure(variant, folder, text, calibration, settings):
    print(json.dumps([text.tolist(), calibration.tolist()]))
    sys.exit()

demo.measure = measure
app.run(demo.main, ["demo", *sys.argv[1:]])
"""


def test_demo_calibrates_on_training_text_only(tmp_path):
    """What is measured is the text held out, of which calibration sees nothing."""
    for i in range(8):
        (tmp_path / f"{i}.txt").write_text("")
    held_out = load_corpus(tmp_path).held_out_files  # chosen by the names
    for i in range(8):
        (tmp_path / f"{i}.txt").write_text(("h" if f"{i}.txt" in held_out else "t") * 300)
    options = ["--config.demo.sequence_length=16", "--windows=4", "--config.demo.calibration_windows=6"]
    command = ["-c", _FIRST_MEASUREMENT, f"--corpus={tmp_path}", f"--output_dir={tmp_path / 'out'}", *options]
    text, calibration = (np.array(a) for a in last_json(run_python(*command)))
    assert text.shape == (4, 17) and set(text.ravel().tolist()) <= {ord("h"), 0}
    assert calibration.shape == (6, 16) and set(calibration.ravel().tolist()) <= {ord("t"), 0}


def test_demo_help():
    result = run_demo("--help")
    assert "--output_dir" in result.stdout
    assert "Held-out windows to evaluate" in result.stdout


@pytest.mark.slow
def test_committed_model_is_small_and_loads():
    from fp4jax.checkpoint import load_model

    folder = ROOT / "experiments" / "checkpoints" / "tiny_lm"
    assert sum(f.stat().st_size for f in folder.glob("*.safetensors")) <= 8 * 2**20
    model, config = load_model(folder)
    ids = jnp.asarray(np.frombuffer(b"import numpy as np\nimport os\n\n\ndef main():\n    ", np.uint8)[None], jnp.int32)
    logits = np.asarray(nnx.jit(lambda model, ids: model(ids))(model, ids)[0, :-1], np.float64)
    nats = np.log(np.exp(logits - logits.max(1, keepdims=True)).sum(1)) + logits.max(1)
    nats -= logits[np.arange(ids.shape[1] - 1), np.asarray(ids[0, 1:])]
    assert config.vocab_size == 256
    assert nats.mean() / np.log(2) < 2.5  # plain Python; an untrained model is at 8 bits per byte

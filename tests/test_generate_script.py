"""experiments/generate.py as users run it: the serving system's own command line, a tokenizer, bytes, devices."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from absl import app
from refusals import check_refusals
from test_quant_config import REFERENCE
from test_quantized_checkpoints import make_folder, plain_folder

from experiments.folder_tokenizer import tokenizer_of

__all__ = ["make_folder", "plain_folder"]  # fixtures

ROOT = Path(__file__).parent.parent
WORDS = {f"w{i}": i for i in range(32)}


def run(*arguments, devices=1):
    env = {
        **os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
    }  # fmt: skip
    command = [sys.executable, "-W", "ignore", str(ROOT / "experiments" / "generate.py"), *arguments]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def add_tokenizer(folder):
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(WORDS, unk_token="w0"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))


def test_the_command_line_of_the_serving_system(make_folder, tmp_path_factory):
    folder, _ = make_folder("modelopt")
    add_tokenizer(folder)
    out = tmp_path_factory.mktemp("out")
    common = (f"--model={folder}", f"--quantization={REFERENCE}", "--prompt=w3 w1 w30", "--max_new_tokens=4")
    text = run(*common, f"--json={out}/a.json", "--block_graph_sizes=4,8", "--block_graph_debug")
    assert "linear layers BlockFP8Linear, experts NVFP4Tensor" in text and "tokens/s" in text
    report = json.loads((out / "a.json").read_text())
    assert report["prompt_ids"] == [3, 1, 30] and len(report["ids"]) == 4
    assert report["text"].split() == [f"w{i}" for i in report["ids"]]
    assert report["prefill_tokens_per_s"] > 0 and report["decode_tokens_per_s"] > 0


@pytest.mark.slow
def test_bytes_and_devices(tmp_path):
    """The committed model, its experts quantized while loading, on two devices with tokens in NVFP4 between them."""
    mixed = '{"quantization": "mix_quant", "moe_quant_type": "modelopt_fp4"}'
    common = (
        f"--model={ROOT}/experiments/checkpoints/tiny_lm",
        "--prompt=def read_lines(path):\n",
        f"--json={tmp_path}/a.json",
    )
    run(*common, f"--quantization={mixed}", "--ep=2", "--max_new_tokens=12", devices=2)
    report = json.loads((tmp_path / "a.json").read_text())
    assert bytes(report["ids"]).decode(errors="replace") == report["text"]
    assert report["text"].startswith("    ")  # a function's body
    run(*common, f"--quantization={mixed}", "--noblock_graph", "--max_new_tokens=12")
    assert json.loads((tmp_path / "a.json").read_text())["ids"][:4] == report["ids"][:4]
    run(*common, "--temperature=0.7", "--seed=3", "--max_new_tokens=5")
    assert len(json.loads((tmp_path / "a.json").read_text())["ids"]) == 5


def test_a_broken_tokenizer_is_named(tmp_path):
    (tmp_path / "tokenizer.json").write_text('{"model":')
    with pytest.raises(app.UsageError, match=r"tokenizer\.json is not a tokenizer: "):
        tokenizer_of(tmp_path, None)


def test_bad_flags_are_refused(tmp_path):
    tiny = f"--model={ROOT}/experiments/checkpoints/tiny_lm"
    check_refusals(
        "generate",
        {
            (f"--model={tmp_path}",): "config.json does not exist",
            (tiny, "--quantization={"): "not JSON",
            (tiny, "--quantization=wint2"): "quantization='wint2' is not supported",
            (tiny, "--ep=1000"): "--ep=1000: JAX sees",
            (tiny, "--low_latency"): "--low_latency is about decode steps across devices",
            (tiny, "--prompt="): "--prompt has 0 tokens",
            (tiny, "--max_new_tokens=100000"): "exceed max_position_embeddings",
            (tiny, "stray"): "unexpected arguments",
        },
    )

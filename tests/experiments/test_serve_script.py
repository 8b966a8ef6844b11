"""experiments/serve.py as users run it: a process that gets SIGTERM, and command lines that it must refuse."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys

import httpx
import openai
import pytest
from python_runs import ROOT, run_python
from refusals import check_refusals

MODEL = str(ROOT / "experiments" / "checkpoints" / "tiny_lm")
SIZES = (
    "--served_model_name=bytes",
    "--max_requests=2",
    "--max_length=128",
    "--page_size=16",
    "--dtype=float32",
    "--port=0",
)


@contextlib.contextmanager
def started(*arguments, **environment):
    """The process, once it is ready, and its address."""
    command = [sys.executable, ROOT / "experiments" / "serve.py", f"--model={MODEL}", *SIZES, *arguments]
    env = {
        **os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), "XLA_FLAGS": "", "JAX_NUM_CPU_DEVICES": "2",
        "FD_BLOCK_WISE_CUDA_GRAPH_SIZES": "32", **environment,
    }  # fmt: skip
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            line = next(line for line in process.stdout if line.startswith("serving"))
            yield process, re.fullmatch(r"serving bytes at (http://127\.0\.0\.1:\d+)(?:, without keys)?\n", line)[1]
        finally:
            process.kill()


def complaints(process):
    """What an ended process has written to stderr, but for the progress bar of compiling."""
    return [line for line in process.stderr.read().splitlines() if line and not line.startswith("compiling blocks")]


@pytest.mark.slow
@pytest.mark.parametrize("ep", [1, 2])
def test_a_process_finishes_its_stream_after_sigterm_and_exits_with_0(tmp_path, ep):
    (tmp_path / "keys.txt").write_text("first\n\n second \n")
    arguments = f"--api_key_file={tmp_path}/keys.txt", f"--ep={ep}"
    with (
        started(*arguments, FD_DISPATCH_USE_FP4="1") as (process, url),
        openai.OpenAI(base_url=f"{url}/v1", api_key="second", max_retries=0, timeout=60) as client,
    ):
        options = dict(model="bytes", prompt="import ", max_tokens=100, temperature=0)
        whole = client.completions.create(**options).choices[0].text
        stream = client.completions.create(**options, stream=True)
        text = next(stream).choices[0].text
        process.send_signal(signal.SIGTERM)
        text += "".join(piece.choices[0].text for piece in stream)
        assert len(text) == 100 and text == whole
        assert process.wait(30) == 0 and not complaints(process)
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{url}/health")


@pytest.mark.slow
def test_a_process_whose_time_is_up_ends_the_stream_with_an_error_and_exits_with_0():
    with (
        started("--shutdown_seconds=0") as (process, url),
        openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60) as client,
    ):
        stream = client.completions.create(model="bytes", prompt="import ", max_tokens=110, stream=True)
        next(stream)
        process.send_signal(signal.SIGTERM)
        with pytest.raises(openai.APIError, match="has shut down"):
            list(stream)
        assert process.wait(30) == 0 and not complaints(process)


def test_command_lines_that_cannot_work_are_refused_before_anything_is_loaded(tmp_path):
    (tmp_path / "empty").write_text("\n")
    (tmp_path / "strange").write_text("schlüssel\n")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text((ROOT / MODEL / "config.json").read_text())
    (tmp_path / "broken" / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{% if %}"}))
    model = f"--model={MODEL}"
    check_refusals(
        "serve",
        {
            ("--model=nowhere",): "nowhere",
            (model, f"--api_key_file={tmp_path}/none"): f"--api_key_file={tmp_path}/none: ",
            (model, f"--api_key_file={tmp_path}/empty"): "has no keys",
            (model, f"--api_key_file={tmp_path}/strange"): "ASCII",
            (model, "--host=203.0.113.1"): "--host=203.0.113.1 --port=8000: ",
            (model, "--port=70000"): "port",
            (model, "--max_length=4096"): "max_position_embeddings=2048",
            (model, "--prefill_buckets=8,4"): "--prefill_buckets",
            (model, "--quantization=nonsense", "--port=0"): "nonsense",
            (f"--model={tmp_path}/broken",): "not a chat template",
        },
    )


# In a process of its own, as another script may have defined a flag of the same name in this one.
_BUCKETS = """
import os, sys
from absl import app, flags
from experiments.harness import engine_flags

flags.FLAGS(["serve", sys.argv[1]])
for sizes, graphs, flag in (
    ("16,64", "1", None), ("16,64", "1", ["8"]), ("64,16", "1", None), (None, "1", None), (None, "0", None)
):
    os.environ |= {"FD_BLOCK_WISE_CUDA_GRAPH_SIZES": sizes or "", "FD_USE_BLOCK_WISE_CUDA_GRAPH": graphs}
    if sizes is None:
        del os.environ["FD_BLOCK_WISE_CUDA_GRAPH_SIZES"]
    flags.FLAGS.prefill_buckets = flag
    try:
        print(engine_flags.engine_options().sizes["prefill_buckets"])
    except app.UsageError as error:
        print(error)
"""


def test_prefill_buckets_come_from_the_flag_else_the_environment():
    done = run_python("-c", _BUCKETS, f"--model={MODEL}")
    assert done.returncode == 0, done.stdout + done.stderr
    of_environment, of_flag, falling, default, no_graphs = done.stdout.splitlines()[-5:]
    assert (of_environment, of_flag, default) == ("(16, 64)", "(8,)", "(128, 512, 2048)")
    assert "FD_BLOCK_WISE_CUDA_GRAPH_SIZES: " in falling and "FD_USE_BLOCK_WISE_CUDA_GRAPH: " in no_graphs

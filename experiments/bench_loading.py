"""Measures how fast a checkpoint loads, and how much host memory loading takes beside the model itself.

    python experiments/bench_loading.py                       # writes 2 GB in NVFP4, loads it; about a minute
    python experiments/bench_loading.py --gigabytes=4         # another size; the folder is removed at the end
    python experiments/bench_loading.py --model=DIR           # an existing folder

Every load runs in a new process: some with the files in the page cache (warm), some without (cold). Memory is sampled
every few milliseconds; peaks are above what the process held after importing and starting JAX, and on CPU devices the
arrays of the model are subtracted too. Anonymous memory is what loading allocates. File pages are the mapped
checkpoint, which the operating system can drop.

Without --model, a second folder shows what checking names costs: it has small tensors but as many as a large model has
(94 layers of 128 experts), and its config has an entry for each of the 36,096 projections. Writes bench_loading.json
into --output_dir.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import app, flags
from flax import nnx
from tqdm import tqdm

from experiments.cases.checkpoint import Shape, layers_for, write_checkpoint
from experiments.harness import outputs, script, timing
from experiments.harness.flag_values import finite
from fp4jax.checkpoint import load_model
from fp4jax.checkpoint.match import match_folder

_MODEL = flags.DEFINE_string("model", None, "Folder to load; default: a synthetic one, which is removed afterwards.")
_GIGABYTES = flags.DEFINE_float(
    "gigabytes", 2.0, "Size of the synthetic folder in GB, rounded to whole layers of Qwen3-30B.", lower_bound=0.1
)
_ROUNDS = flags.DEFINE_integer(
    "rounds", 2, "Loads with cold and with warm cache each; the fastest counts.", lower_bound=1
)
_OUTPUT_DIR = flags.DEFINE_string("output_dir", "output/bench_loading", "Folder for the JSON file.")

_SAMPLE_SECONDS = 0.002
# The number of layers of Qwen3-235B; with 128 experts each, the folder has as many tensors as that model.
_MANY_LAYERS = 94
_MANY = Shape(
    hidden_size=32, moe_intermediate_size=16, num_attention_heads=2, num_key_value_heads=1, head_dim=16, vocab_size=64
)
_ROOT = Path(__file__).parents[1]
_CHILD = "import json, sys; from experiments.bench_loading import measure; print(json.dumps(measure(sys.argv[1])))"


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    path = outputs.check_folder("output_dir", _OUTPUT_DIR.value, "bench_loading.json") / "bench_loading.json"
    num_bytes = int(finite("gigabytes", _GIGABYTES.value) * 1e9)
    if _MODEL.value is not None:
        try:
            match_folder(Path(_MODEL.value))
        except (ValueError, OSError) as error:
            raise app.UsageError(f"--model: {error}") from error
    elif num_bytes > (free := shutil.disk_usage(tempfile.gettempdir()).free):
        raise app.UsageError(f"--gigabytes={_GIGABYTES.value}: {tempfile.gettempdir()} has room for {free / 1e9:.1f}")
    with tempfile.TemporaryDirectory(prefix="bench_loading_") as temporary:
        folder, name = Path(_MODEL.value or temporary), _MODEL.value
        if name is None:
            layers = layers_for(num_bytes)
            write_checkpoint(folder, layers)
            name = f"{layers} layers of Qwen3-30B, NVFP4"
        rows = measure_all(folder, name)
        if _MODEL.value is None:
            many = folder / "many"
            write_checkpoint(many, _MANY_LAYERS, _MANY, entry_per_projection=True)
            rows += measure_all(many, f"{_MANY_LAYERS} layers of {_MANY.num_experts} small experts, an entry for each")
    inputs = "random codes and scales in ModelOpt's layout, sharded" if _MODEL.value is None else "a folder as it is"
    timing.save_results(path, "bench_loading", rows, inputs=inputs)
    print("cache   seconds    GB/s   host memory, peak in MB: anonymous    files   (largest parameter: MB)")
    for row in rows:
        peaks = (row[f"{name}_bytes"] / 1e6 for name in ("peak_anonymous", "peak_file", "largest_parameter"))
        numbers = "{:36.0f} {:8.0f} {:25.0f}".format(*peaks)
        print(f"{row['cache']:5} {row['seconds']:9.2f} {row['gigabytes_per_second']:7.2f} {numbers}")
    print(f"wrote {path}")


def measure_all(folder: Path, name: str) -> list[dict[str, Any]]:
    """Load a folder with cold and with warm cache; one row for each, of the fastest load."""
    files = sorted(folder.glob("*.safetensors"))
    size = sum(file.stat().st_size for file in files)
    rows = []
    with tqdm(total=2 * _ROUNDS.value, unit="load", desc=name) as progress:
        for cache in ("cold", "warm"):
            found = []
            for _ in range(_ROUNDS.value):
                if cache == "cold":
                    drop_from_cache(files)
                found.append(load_in_a_process(folder))
                progress.update()
            best = min(found, key=lambda one: one["seconds"])
            speed = size / 1e9 / best["seconds"]
            rows.append({"model": name, "cache": cache, "bytes": size, "gigabytes_per_second": speed, **best})
    return rows


def load_in_a_process(folder: Path) -> dict[str, Any]:
    """The result of `measure` in a new process.

    Raises:
      RuntimeError: the process failed; the message holds what it wrote to stderr.
    """
    env = {**os.environ, "PYTHONPATH": str(_ROOT)}
    command = [sys.executable, "-c", _CHILD, str(folder)]
    done = subprocess.run(command, env=env, cwd=_ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"loading {folder} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def measure(folder: str) -> dict[str, Any]:
    """Load a folder once; seconds and peak bytes, as the module's docstring explains them."""
    jax.block_until_ready(jax.device_put(np.zeros(1)))
    before = _memory()
    with _Sampler() as peak:
        start = time.perf_counter()
        model, _ = load_model(folder)
        leaves = jax.block_until_ready(jax.tree.leaves(nnx.state(model)))
        seconds = time.perf_counter() - start
    held = sum(leaf.nbytes for leaf in leaves if next(iter(leaf.devices())).platform == "cpu")
    return {
        "seconds": seconds,
        "peak_anonymous_bytes": max(0, peak.anonymous - before["RssAnon"] - held),
        "peak_file_bytes": max(0, peak.file - before["RssFile"]),
        "model_bytes": sum(leaf.nbytes for leaf in leaves),
        "largest_parameter_bytes": max(leaf.nbytes for leaf in leaves),
        "arrays": len(leaves),
    }


class _Sampler:
    """The largest anonymous and file-backed resident memory, in bytes, while this context manager is active."""

    def __init__(self) -> None:
        self.anonymous = self.file = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        while not self._stop.wait(_SAMPLE_SECONDS):
            now = _memory()
            self.anonymous, self.file = max(self.anonymous, now["RssAnon"]), max(self.file, now["RssFile"])

    def __enter__(self) -> "_Sampler":
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()


def _memory() -> dict[str, int]:
    """The resident memory of this process in bytes, by the names in /proc/self/status, such as RssAnon."""
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("Rss"))
    return {name.rstrip(":"): int(number) * 1024 for name, number, _ in lines}


def drop_from_cache(files: list[Path]) -> None:
    """Ask the operating system to drop the cached pages of these files."""
    for file in files:
        with file.open("rb") as content:
            os.fsync(content.fileno())
            os.posix_fadvise(content.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


if __name__ == "__main__":
    script.run(main)

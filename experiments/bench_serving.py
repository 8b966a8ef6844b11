"""Measures `engine.Engine`: requests that arrive at random, and what the engine adds to the bare decode program.

    python experiments/bench_serving.py --requests=32 --rates=2,8,32            # on one GPU
    python experiments/bench_serving.py --ranks=2 --wire_formats=nvfp4,bf16     # experts over two GPUs
    JAX_PLATFORMS=cpu python experiments/bench_serving.py                       # a tiny model: checks that it runs

The model has random weights, experts in NVFP4 (W4A16), and everything else in bf16. Rows with phase "trace" replay
--count requests whose arrivals are a Poisson process and whose lengths are log-normal, both from a fixed seed, at each
of --rates requests per second (inf: all at once). They say how many tokens per second were generated, how long a
request waited for its first token and for each token behind it (half of the requests, and 99% of them, at most), and
how many pages were in use. Rows with phase "decode" run a full batch of --requests requests per device, once through
the engine, and once as repetitions of its last call of the decode program; `overhead` is the share that the engine
adds.

Writes bench_serving.json and bench_serving.png into --output_dir.
"""

import gc
import os
import time
from typing import Any

import jax
import numpy as np
from absl import app, flags
from tqdm import tqdm

from experiments.cases import models as model_cases
from experiments.cases.traces import poisson_trace, replay
from experiments.harness import outputs, script, timing
from experiments.harness.flag_values import choices, integers
from experiments.harness.serving_report import plot, serving_text
from fp4jax.engine import Engine
from fp4jax.models import configure_experts

_MODELS = flags.DEFINE_list("models", None, "Models, as in bench_model.py; default: qwen3-30b (CPU: tiny).")
_LAYERS = flags.DEFINE_integer("layers", None, "Decoder layers; default: all of the model.", lower_bound=1)
_RANKS = flags.DEFINE_list("ranks", ["1"], "Numbers of devices that the experts are split over.")
_REQUESTS = flags.DEFINE_list("requests", None, "Requests that a device runs at a time; default: 8,32,128 (CPU: 3).")
_RATES = flags.DEFINE_list("rates", None, "Requests per second and device; default: 2,8,inf (CPU: inf).")
_COUNT = flags.DEFINE_integer("count", None, "Requests of a trace, per device; default: 128 (CPU: 6).", lower_bound=1)
_PROMPT = flags.DEFINE_integer("prompt", None, "Median of the prompts' tokens; default: 512 (CPU: 12).", lower_bound=1)
_ANSWER = flags.DEFINE_integer("answer", None, "Median of the answers' tokens; default: 128 (CPU: 6).", lower_bound=1)
_MAX_LENGTH = flags.DEFINE_integer("max_length", None, "Most tokens of a request; default: 2048 (CPU: 48).")
_BUCKETS = flags.DEFINE_list("prefill_buckets", None, "Buckets of prefill; default: 128,512,2048 (CPU: 8).")
_PREFILL_TOKENS = flags.DEFINE_integer(
    "prefill_tokens", None, "Most tokens of prompts in a step; default: the largest bucket.", lower_bound=1
)
_WIRE_FORMATS = flags.DEFINE_list("wire_formats", ["nvfp4"], "Formats of tokens that cross between devices.")
_OUTPUT_DIR = flags.DEFINE_string("output_dir", "output/bench_serving", "Folder for the JSON and PNG files.")

_INPUTS = "random weights, experts in NVFP4 (W4A16); random token ids; greedy answers without stop tokens"
_WIRES = ("nvfp4", "fp8", "bf16")


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    folder = outputs.check_folder("output_dir", _OUTPUT_DIR.value, "bench_serving.json", "bench_serving.png")
    gpu = timing.on_gpu()
    default = lambda flag, on_gpu, on_cpu: flag.value if flag.value is not None else on_gpu if gpu else on_cpu  # noqa: E731
    names = choices("models", _MODELS.value, model_cases.MODELS, ("qwen3-30b",) if gpu else ("tiny",))
    ranks, requests = integers("ranks", _RANKS.value), integers("requests", default(_REQUESTS, (8, 32, 128), (3,)))
    wires = choices("wire_formats", _WIRE_FORMATS.value, _WIRES, _WIRES[:1])
    rates = [positive_rate(text) for text in default(_RATES, ("2", "8", "inf"), ("inf",))]
    sizes = dict(
        prefill_buckets=integers("prefill_buckets", default(_BUCKETS, (128, 512, 2048), (8,))),
        max_length=default(_MAX_LENGTH, 2048, 48),
        prefill_tokens=_PREFILL_TOKENS.value,
    )
    lengths = dict(prompt=default(_PROMPT, 512, 12), answer=default(_ANSWER, 128, 6), longest=sizes["max_length"])
    if max(ranks) > len(jax.devices()):
        raise app.UsageError(f"--ranks={max(ranks)}: JAX sees {len(jax.devices())} devices")
    folder.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    plan = [(name, r, wire) for name in names for r in ranks for wire in (wires if r > 1 else (None,))]
    with tqdm(total=len(plan) * len(requests) * (len(rates) + 1), unit="row") as progress:
        for name, devices, wire in plan:
            progress.set_description(f"{name}, {devices} devices: making the model")
            layers = _LAYERS.value or model_cases.usual_layers(name)
            model, mesh = make_model(name, layers, devices, wire)
            for size in requests:
                common = {"model": name, "layers": layers, "ranks": devices, "requests": size, "wire_format": wire}
                progress.set_description(f"{name}, {devices} devices, {size} requests: compiling")
                engine = Engine(model, max_requests=size, mesh=mesh, draws=False, **sizes)
                engine.warm_up(workers=os.cpu_count() or 1)
                for rate in rates:
                    progress.set_description(f"{name}, {devices} devices, {size} requests, {rate} a second")
                    trace = poisson_trace(
                        default(_COUNT, 128, 6) * devices, rate * devices, engine.config.vocab_size, **lengths
                    )
                    rows.append(common | {"phase": "trace", "rate": str(rate), **replay(engine, trace)})
                    progress.update()
                rows.append(common | {"phase": "decode", **overhead(engine, size * devices)})
                progress.update()
                timing.save_results(folder / "bench_serving.json", "bench_serving", rows, inputs=_INPUTS)
                engine = None
                gc.collect()
            model = None
            gc.collect()
    print(serving_text(rows))
    plot(rows, folder / "bench_serving.png")
    print(f"wrote {folder}/bench_serving.json and bench_serving.png")


def positive_rate(text: str) -> float:
    """A rate of the flag; raises app.UsageError unless it is a positive number or inf."""
    try:
        rate = float(text)
    except ValueError:
        rate = 0.0
    if not rate > 0:
        raise app.UsageError(f"--rates: {text!r} is no positive number")
    return rate


def make_model(name: str, layers: int, devices: int, wire: str | None) -> tuple[Any, Any]:
    """A model with random weights, and the mesh that its experts are split over; None: one device."""
    model = model_cases.random_model(model_cases.model_config(name, layers), "w4a16", "bf16")
    if devices == 1:
        return model, None
    mesh = jax.make_mesh((devices,), ("ep",), devices=jax.devices()[:devices])
    configure_experts(model, mesh=mesh, wire_format=wire)
    return model, mesh


def overhead(engine: Engine, count: int) -> dict[str, Any]:
    """Decodes a full batch through the engine, and by its decode program alone.

    The requests start from prompts of one token, and the time counts from the step at which all of them decode.
    """
    steps, rng = engine.decode_steps, np.random.default_rng(0)
    calls = max(2, min(16, (engine.max_length - 2) // steps - 2))
    prompts = [rng.integers(0, engine.config.vocab_size, 1).tolist() for _ in range(count)]
    ids = [engine.submit(prompt, engine.max_length - 1) for prompt in prompts]
    while engine.report().decoding < count:
        engine.step()
    engine.step()
    start = time.perf_counter()
    for _ in range(calls):
        engine.step()
    through = (time.perf_counter() - start) / calls
    bare = engine.time_decode(calls)  # with the requests as they stand, which are routed as they are in the engine
    for id in ids:
        engine.cancel(id)
    while not engine.is_idle:
        engine.step()
    return {
        "us_per_step": round(1e6 * bare / steps, 1), "us_per_step_engine": round(1e6 * through / steps, 1),
        "overhead": round(through / bare - 1, 4), "tokens_per_s": round(count * steps / through, 1),
    }  # fmt: skip


if __name__ == "__main__":
    script.run(main)

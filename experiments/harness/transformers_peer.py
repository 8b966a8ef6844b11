"""Times the decoder layers of Hugging Face transformers, in a process of its own that imports neither JAX nor fp4jax.

    python -m experiments.harness.transformers_peer REQUEST.json ANSWERS.jsonl

`bench_model` starts it before JAX takes the memory of the GPU. The request has the fields of `Request`. The process
appends one JSON object per cell and implementation to the file of answers as soon as it is measured, so that what was
measured before a failure is kept.

The model is bf16 with sdpa attention and random weights, and its experts run as `grouped_mm` where that version of
transformers knows it. The stack of decoder layers is called with embedded tokens, so neither the embedding nor the head
is in its time; the last norm, the mask and the angles of RoPE are. "transformers" is eager: a prefill fills a new
DynamicCache, and a decode step appends to one. "transformers compiled" is torch.compile: decode steps in the mode
reduce-overhead (CUDA graphs) with a StaticCache of the context's size, as `generate` does it; a prefill without a
cache, so that its attention needs no mask.
"""

import dataclasses
import gc
import json
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch  # pyrefly: ignore[missing-import]
import transformers  # pyrefly: ignore[missing-import]
from torch.profiler import ProfilerActivity, profile  # pyrefly: ignore[missing-import]
from tqdm import tqdm

from experiments.harness.model_stages import by_kernel_name

_STEPS = 20  # the most calls that follow each other without waiting
_ROUND_US = 50_000


@dataclasses.dataclass(frozen=True)
class Request:
    """What to measure.

    Attributes:
      config: the content of `config.json`, with as many layers as are measured.
      cells: [phase, requests, tokens, context] of every row.
      implementations: "transformers", "transformers compiled".
      repeats: timed rounds.
      profile: whether to profile the kernels.
      device: the device of torch.
    """

    config: dict[str, Any]
    cells: list[list[Any]]
    implementations: list[str]
    repeats: int
    profile: bool
    device: str = "cuda"


@dataclasses.dataclass(frozen=True)
class Timed:
    """A function to time, and what is called before each series of its calls.

    Attributes:
      run: starts the work.
      restart: brings the cache back to the context.
      cache_bytes: bytes of the cache.
    """

    run: Callable[[], Any]
    restart: Callable[[], None]
    cache_bytes: int


def main(request_file: str, answers_file: str) -> None:
    """Measure everything that a request asks for; the first answer says whether anything can be measured."""
    request = Request(**json.loads(Path(request_file).read_text()))
    with Path(answers_file).open("a") as answers:

        def answer(fields: dict[str, Any]) -> None:
            answers.write(json.dumps(fields) + "\n")
            answers.flush()

        if request.device == "cuda" and not torch.cuda.is_available():
            answer({"problem": "torch sees no GPU"})
            return
        try:
            model = make_model(request.config, request.device)
        except Exception as error:
            answer({"problem": f"transformers did not make the model: {_reason(error)}"})
            return
        experts = getattr(model.config, "_experts_implementation", "eager")
        versions = f"transformers {transformers.__version__} with torch {torch.__version__}"
        answer({"about": f"{versions}: bf16, sdpa, experts as {experts}"})

        todo = [(cell, name) for cell in request.cells for name in request.implementations]
        for cell, name in tqdm(todo, unit="row", desc="transformers"):
            answer({"cell": cell, "implementation": name, **measured(model, cell, name, request)})


def make_model(config: dict[str, Any], device: str) -> Any:
    """A causal language model with random weights, made on the device."""

    def make(**more: Any) -> Any:
        values = dict(config)
        found = transformers.AutoConfig.for_model(values.pop("model_type"), **values)
        options = dict(dtype=torch.bfloat16, attn_implementation="sdpa", **more)
        return transformers.AutoModelForCausalLM.from_config(found, **options)

    with torch.device(device):
        try:
            model = make(experts_implementation="grouped_mm")
        except (TypeError, ValueError):  # a version that does not know it
            model = make()
    return model.eval()


def measured(model: Any, cell: list[Any], name: str, request: Request) -> dict[str, Any]:
    """The measured columns of one row; a row that fails has an `error` instead.

    Compilers and kernels of other libraries fail in many ways, and none of them should end the run.
    """
    gc.collect()
    torch._dynamo.reset()
    if request.device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    try:
        with torch.no_grad():
            return _measure(model, cell, name, request)
    except torch.OutOfMemoryError as error:
        return {"error": f"out of memory: {_reason(error)}"}
    except Exception as error:
        return {"error": f"failed: {_reason(error)}"}


def _measure(model: Any, cell: list[Any], name: str, request: Request) -> dict[str, Any]:
    phase, requests, tokens, context = cell
    layers, compiled = model.config.num_hidden_layers, name == "transformers compiled"
    shape = (1, tokens) if phase == "prefill" else (requests, 1)
    ids = torch.randint(model.config.vocab_size, shape, device=request.device)
    timed = _prefill(model, ids, compiled) if phase == "prefill" else _decode(model, ids, context, compiled)

    def ends() -> Any:
        return model.lm_head(model.get_input_embeddings()(ids)[:, -1:]).argmax(-1)

    us = _wall_us(timed, request)
    found: dict[str, Any] = {
        "us_per_layer": round(us / layers, 2),
        "ends_us": round(_wall_us(Timed(ends, lambda: None, 0), request), 2),
        "weights_gb": round(sum(p.nbytes for p in model.parameters()) / 1e9, 3),
        "cache_gb": round(timed.cache_bytes / 1e9, 3),
    }
    if request.device == "cuda":
        found["peak_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 3)
        if request.profile:
            found |= _kernel_columns(timed, layers)
    return found


def _prefill(model: Any, ids: Any, compiled: bool) -> Timed:
    stack, x = model.model, model.get_input_embeddings()(ids)
    run = torch.compile(stack, dynamic=False) if compiled else stack
    cache_bytes = 0
    if not compiled:
        cache_bytes = _bytes_of(stack(inputs_embeds=x, use_cache=True).past_key_values)
    return Timed(
        lambda: run(inputs_embeds=x, use_cache=not compiled).last_hidden_state, lambda: None, cache_bytes
    )  # fmt: skip


def _decode(model: Any, ids: Any, context: int, compiled: bool) -> Timed:
    stack, x = model.model, model.get_input_embeddings()(ids)
    if not compiled:
        first = transformers.DynamicCache(config=model.config)
        stack(inputs_embeds=x, past_key_values=first, use_cache=True)  # shows the shapes of keys and values
        filled = [[_random(part, context) for part in (layer.keys, layer.values)] for layer in first.layers]
        state = [first]

        def restart() -> None:
            state[0] = transformers.DynamicCache(config=model.config)
            for index, (keys, values) in enumerate(filled):
                state[0].update(keys, values, index)

        def run() -> Any:
            return stack(inputs_embeds=x, past_key_values=state[0], use_cache=True).last_hidden_state

        restart()
        return Timed(run, restart, _bytes_of(state[0]))
    cache = transformers.StaticCache(config=model.config, max_cache_len=context + _STEPS + 1)
    stack(inputs_embeds=x, past_key_values=cache, use_cache=True)  # makes the arrays
    for layer in cache.layers:
        layer.keys.normal_()
        layer.values.normal_()
    step = torch.compile(stack, mode="reduce-overhead", dynamic=False)

    def restart_static() -> None:
        for layer in cache.layers:
            layer.cumulative_length.fill_(context)

    def run_static() -> Any:
        torch.compiler.cudagraph_mark_step_begin()
        return step(inputs_embeds=x, past_key_values=cache, use_cache=True).last_hidden_state

    restart_static()
    return Timed(run_static, restart_static, _bytes_of(cache))


def _random(part: Any, context: int) -> Any:
    """Random keys or values for `context` tokens, of the shape that they have for one token."""
    return part.new_empty((*part.shape[:-2], context, part.shape[-1])).normal_()


def _bytes_of(cache: Any) -> int:
    return sum(part.nbytes for layer in cache.layers for part in (layer.keys, layer.values))


def _wall_us(timed: Timed, request: Request) -> float:
    """The median microseconds per call of calls that follow each other without waiting."""
    wait = torch.cuda.synchronize if request.device == "cuda" else lambda: None

    def round_us(count: int) -> float:
        timed.restart()
        wait()
        start = time.perf_counter()
        for _ in range(count):
            timed.run()
        wait()
        return 1e6 * (time.perf_counter() - start) / count

    for _ in range(3):  # compiles, records a CUDA graph, replays it
        last = round_us(1)
    count = min(_STEPS, max(1, round(_ROUND_US / last)))
    return statistics.median(round_us(count) for _ in range(request.repeats))


def _kernel_columns(timed: Timed, layers: int) -> dict[str, Any]:
    """Sum and number of the kernels of one call, and their stages by name."""
    timed.restart()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as prof:
        timed.run()
        torch.cuda.synchronize()
    kernels: Counter[str] = Counter()
    number = 0
    for event in prof.events():
        on_gpu = event.device_type == torch.autograd.DeviceType.CUDA
        if on_gpu and not getattr(event, "is_user_annotation", False):
            kernels[event.name] += event.time_range.elapsed_us()
            number += 1
    return {
        "kernel_us_per_layer": round(sum(kernels.values()) / layers, 2),
        "kernels_per_layer": round(number / layers, 2), "stages": by_kernel_name(kernels, layers),
    }  # fmt: skip


def _reason(error: Exception) -> str:
    lines = str(error).splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:200]}"


if __name__ == "__main__":
    main(*sys.argv[1:3])

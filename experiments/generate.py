"""Generates text with the model of a checkpoint.

    python experiments/generate.py --model=experiments/checkpoints/tiny_lm --prompt='def read_lines(path):'
    python experiments/generate.py --model=DIR --quantization='{"quantization":"mix_quant",
        "dense_quant_type":"block_wise_fp8","is_moe_quantized":true,"moe_quant_type":"modelopt_fp4"}'

It loads every folder that inspect_checkpoint.py says loads. The tokenizer is the folder's tokenizer.json, which needs
the `tokenizers` package; a model of at most 256 tokens without that file reads bytes. The script prints the text, and
the tokens per second of prefill and of decoding, without compilation, if there are enough tokens to measure them. It
writes them as JSON if --json names a file.

--ep splits the experts over several devices; --wire_format, or the environment variable FD_DISPATCH_USE_FP4, says in
which format tokens cross between them. The model runs in blocks that are compiled ahead of time for fixed token counts
(experiments/harness/block_graph_flags.py lists the environment variables); with --noblock_graph it runs as one program,
which knows no stop tokens while it runs. The output says which of the two ran.
"""

import os
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from experiments.harness import (
    block_graph_flags,
    block_report,
    cache_flag,
    model_flags,
    outputs,
    rates,
    script,
    store_flag,
    wire_flag,
)
from experiments.harness.flag_values import finite
from experiments.text.files import check_text, read_text
from experiments.text.tokenizers import tokenizer_of
from fp4jax.attention import PageFormat
from fp4jax.attention.cache_formats import FP8
from fp4jax.checkpoint import load_model
from fp4jax.checkpoint.folder_config import end_token_ids, read_config
from fp4jax.engine import BucketedModel, Sampling
from fp4jax.models import configure_experts, generate

_DEFAULT_PROMPT = "The meaning of life is"
_MODEL = flags.DEFINE_string(
    "model", None, "Folder of the checkpoint, in Hugging Face layout; required.", required=True
)
_PROMPT = flags.DEFINE_string("prompt", None, f"Text that the model continues; default: '{_DEFAULT_PROMPT}'.")
_PROMPT_FILE = flags.DEFINE_string(
    "prompt_file", None, "File with the prompt, which is used as it is, its last line end included; -: standard input."
)
_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 64, "Tokens to generate.", lower_bound=1)
_TEMPERATURE = flags.DEFINE_float(
    "temperature",
    0.0,
    "0 takes the most likely token; larger values draw tokens.",
    lower_bound=0,
)
_TOP_K = flags.DEFINE_integer("top_k", 0, "Draw from the k most likely tokens; 0: from all.", lower_bound=0)
_TOP_P = flags.DEFINE_float(
    "top_p", 1.0, "Draw from the fewest most likely tokens whose probabilities sum to this.", upper_bound=1
)
_MIN_P = flags.DEFINE_float(
    "min_p", 0.0, "Draw from tokens at least this many times as likely as the likeliest.", lower_bound=0, upper_bound=1
)
_SEED = flags.DEFINE_integer("seed", 0, "Seed of the drawn tokens.", lower_bound=0, upper_bound=2**32 - 1)
_EP = flags.DEFINE_integer("ep", 1, "Number of devices that the experts are split over.", lower_bound=1)
_LOW_LATENCY = flags.DEFINE_bool(
    "low_latency", False, "Decode with receive buffers that the program keeps; needs --ep and GPUs of one host."
)
_JSON = flags.DEFINE_string("json", None, "File to write the text and the numbers to, as JSON; default: no file.")


class Request(NamedTuple):
    """What the user asked for, checked before any weight is read.

    Attributes:
      folder: the checkpoint.
      tokenizer: its tokenizer.
      prompt: the text to continue.
      ids: the tokens of the prompt.
      options: how blocks are compiled; if they are not enabled, the model runs as one program.
      wire_format: the format of tokens that cross devices; None: there is one device.
      sampling: how tokens are drawn, and the ids of the tokens that end a text.
    """

    folder: Path
    tokenizer: Any
    prompt: str
    ids: list[int]
    options: block_graph_flags.BlockGraphOptions
    wire_format: str | None
    sampling: Sampling


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    request = checked_request()
    model = loaded_model(request)
    run = in_blocks if request.options.enabled else at_once
    answer, numbers = run(model, request)
    text = request.tokenizer.decode(until_end(answer, set(request.sampling.stop_ids)))
    way = {
        "ran": "in blocks compiled ahead of time" if request.options.enabled else "as one program",
        "ep": _EP.value,
        "wire_format": request.wire_format,
    }
    print(f"\n{request.prompt}{text}\n")
    print(rates.as_text(way, numbers))
    if _JSON.value:
        report = {"prompt": request.prompt, "prompt_ids": request.ids, "text": text, "ids": answer, **way, **numbers}
        outputs.write_json("json", _JSON.value, report)


def checked_request() -> Request:
    """Make the request from the flags and the small files of the folder.

    Raises:
      app.UsageError: a flag would fail after the weights are loaded, or would have no effect.
    """
    options, ep, wire_format = block_graph_flags.block_graph_options(), _EP.value, None
    finite("temperature", _TEMPERATURE.value)
    asked = [f"--{flag.name}" for flag in (_TOP_K, _TOP_P, _MIN_P) if flag.value != flag.default]
    if asked and (_TEMPERATURE.value == 0 or not options.enabled):
        raise app.UsageError(f"{' and '.join(asked)}: tokens are drawn in blocks, with a --temperature above 0")
    if _LOW_LATENCY.value and (ep < 2 or not options.enabled):
        raise app.UsageError("--low_latency is about decode steps across devices: with --ep, in blocks")
    if ep > 1:
        wire_format = wire_flag.wire_format("nvfp4")
    elif wire_flag.WIRE_FORMAT.value is not None:
        raise app.UsageError("--wire_format says how tokens cross between devices: with --ep")
    if _JSON.value is not None:
        outputs.check_file("json", _JSON.value)
    prompt, source = prompt_of_flags()
    folder = Path(_MODEL.value)
    try:
        config, ends = read_config(folder, model_flags.DTYPE.value), end_token_ids(folder)
    except (ValueError, OSError) as error:
        raise app.UsageError(str(error)) from error
    if ep > len(jax.devices()):
        raise app.UsageError(f"--ep={ep}: JAX sees {len(jax.devices())} devices")
    if config.num_experts % ep:
        raise app.UsageError(f"--ep={ep} does not divide the model's {config.num_experts} experts")
    tokenizer = tokenizer_of(folder, config)
    ids = checked_ids(tokenizer, prompt, source, config)
    try:
        sampling = Sampling(
            _TEMPERATURE.value, _TOP_K.value, _TOP_P.value, _MIN_P.value, seed=_SEED.value, stop_ids=tuple(sorted(ends))
        )
    except ValueError as error:
        raise app.UsageError(str(error)) from error
    return Request(folder, tokenizer, prompt, ids, options, wire_format, sampling)


def prompt_of_flags() -> tuple[str, str]:
    """The prompt, and the flag that it comes from.

    Raises:
      app.UsageError: both flags are given, or the text is empty or cannot be read.
    """
    if _PROMPT_FILE.value is None:
        return check_text("prompt", _DEFAULT_PROMPT if _PROMPT.value is None else _PROMPT.value), "--prompt"
    if _PROMPT.value is not None:
        raise app.UsageError("--prompt and --prompt_file exclude each other")
    return read_text("prompt_file", _PROMPT_FILE.value), "--prompt_file"


def checked_ids(tokenizer: Any, prompt: str, source: str, config: Any) -> list[int]:
    """The tokens of the prompt.

    Raises:
      app.UsageError: there are none, the model does not know one of them, or it has too few positions for them and the
        new tokens.
    """
    ids, new = tokenizer.encode(prompt), _NEW_TOKENS.value
    if not ids or max(ids) >= config.vocab_size:
        raise app.UsageError(f"{source} has {len(ids)} tokens, up to {max(ids, default=0)}; the model knows "
                             f"{config.vocab_size}")  # fmt: skip
    if len(ids) + new > config.max_position_embeddings:
        raise app.UsageError(f"{source}: {len(ids)} tokens and {new} new ones exceed max_position_embeddings="
                             f"{config.max_position_embeddings}")  # fmt: skip
    return ids


def loaded_model(request: Request) -> Any:
    """Load the model, with its experts over --ep devices; print how long that took and the kinds of its layers."""
    ep, start = _EP.value, time.perf_counter()
    mesh = jax.make_mesh((ep,), ("ep",), devices=jax.devices()[:ep]) if ep > 1 else None
    try:
        model, config = load_model(
            request.folder, mesh=mesh, quantization=model_flags.QUANTIZATION.value, dtype=model_flags.DTYPE.value,
            input_scales=model_flags.INPUT_SCALES.value, cache_format=cache_flag.CACHE_FORMAT.value,
        )  # fmt: skip
    except (ValueError, FileNotFoundError) as error:
        raise app.UsageError(str(error)) from error
    print(f"loaded in {time.perf_counter() - start:.1f} s: {config.to_hf()['model_type']}, {layer_kinds(model)}")
    print(cache_kind(model))
    if mesh is not None:
        configure_experts(model, wire_format=request.wire_format, low_latency=_LOW_LATENCY.value)
    return model


def layer_kinds(model: Any) -> str:
    """The classes of the model's linear layers and of its expert weights, as text."""
    names = {type(getattr(layer.self_attn, "o_proj", None)).__name__ for layer in model.layers}
    experts = {type(block.w13.get_value()).__name__ for block in model.moe_blocks()}
    kinds = ", ".join(sorted(experts)).replace("ArrayImpl", "plain")
    return f"linear layers {', '.join(sorted(names))}, experts {kinds or 'none'}"


def cache_kind(model: Any) -> str:
    """How the model keeps keys and values, as a sentence."""
    kinds = {np.dtype(f.dtype).name for f in model.cache_formats if isinstance(f, PageFormat)}
    if kinds != {np.dtype(FP8).name}:
        return f"keys and values are cached in {', '.join(sorted(kinds))}"
    asked = (
        "as the folder asks; --cache_format=compute turns it off"
        if cache_flag.CACHE_FORMAT.value == "stored"
        else "as asked"
    )
    return f"keys and values are cached in FP8 (e4m3), {asked}"


def until_end(ids: list[int], ends: set[int]) -> list[int]:
    """The tokens before the first one that ends a text."""
    return ids[: next((i for i, token in enumerate(ids) if token in ends), len(ids))]


def in_blocks(model: Any, request: Request) -> tuple[list[int], dict[str, Any]]:
    """Generate in blocks, compiled for those bucket sizes that this prompt needs.

    Returns the new tokens up to the end of the text, and their rates as `rates.of_run` gives them.
    """
    ids, options = request.ids, request.options
    largest = options.buckets[-1]
    chunks = {largest} if len(ids) > largest else set()
    chunks |= {next(b for b in options.buckets if b >= (len(ids) - 1) % largest + 1)}
    length = len(ids) + _NEW_TOKENS.value
    served = BucketedModel(
        model, buckets=sorted(chunks), batch_buckets=(1,), max_length=length, draws=request.sampling.temperature > 0,
        decode_steps=1 if _LOW_LATENCY.value else max(1, min(8, _NEW_TOKENS.value - 1)),
        store=store_flag.program_store(),
    )  # fmt: skip
    if options.debug:
        block_report.watch(served.graphs)
    start = time.perf_counter()
    served.warm_up(workers=os.cpu_count() or 1)
    compiled = time.perf_counter() - start
    served.generate([ids], min(2, _NEW_TOKENS.value))  # so that no timed call is a first call
    start = time.perf_counter()
    jax.block_until_ready(served.prefill(ids).logits)
    prefill = time.perf_counter() - start
    start = time.perf_counter()
    answer = served.generate([ids], _NEW_TOKENS.value, request.sampling)[0]
    whole = time.perf_counter() - start
    return answer, rates.of_run(len(ids), len(answer), prefill, whole, compiled)


def at_once(model: Any, request: Request) -> tuple[list[int], dict[str, Any]]:
    """Generate in one program for the whole text.

    Returns the new tokens, and their rates as `rates.of_run` gives them.
    """
    ids = request.ids
    prompt = jnp.asarray([ids], jnp.int32)
    sampling: dict[str, Any] = dict(temperature=_TEMPERATURE.value, seed=_SEED.value)

    def seconds(new_tokens):
        start = time.perf_counter()
        out = jax.block_until_ready(generate(model, prompt, max_new_tokens=new_tokens, **sampling))
        return out, time.perf_counter() - start

    first = seconds(1)[1] + seconds(_NEW_TOKENS.value)[1]
    _, prefill = seconds(1)
    out, whole = seconds(_NEW_TOKENS.value)
    numbers = rates.of_run(len(ids), _NEW_TOKENS.value, prefill, whole, first - prefill - whole)
    return np.asarray(out)[0, len(ids) :].tolist(), numbers


if __name__ == "__main__":
    script.run(main)

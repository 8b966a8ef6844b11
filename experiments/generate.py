"""Text from a checkpoint: python experiments/generate.py --model=DIR --prompt='Once upon a time'

    python experiments/generate.py --model=experiments/checkpoints/tiny_lm --prompt='def read_lines(path):'
    python experiments/generate.py --model=DIR --quantization='{"quantization":"mix_quant",
        "dense_quant_type":"block_wise_fp8","is_moe_quantized":true,"moe_quant_type":"modelopt_fp4"}'

Loads any folder that inspect_checkpoint.py says loads, with the tokenizer of its tokenizer.json (the `tokenizers`
package; a model of at most 256 tokens without one reads bytes), and prints the continuation and tokens per second of
prefill and decoding, compilation apart. --ep splits the experts over devices; --wire_format, or FD_DISPATCH_USE_FP4,
says how tokens cross between them. Without sampling the model runs in blocks compiled ahead of time: --block_graph and
its environment switches, see experiments/flags.py.
"""

import json
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from experiments import block_report, flags as shared_flags
from experiments.folder_tokenizer import tokenizer_of
from fp4jax.checkpoint import load_model
from fp4jax.checkpoint.folder_config import end_token_ids
from fp4jax.models import BucketedModel, configure_experts, generate

_MODEL = flags.DEFINE_string("model", None, "Folder in Hugging Face layout.", required=True)
_PROMPT = flags.DEFINE_string("prompt", "The meaning of life is", "Text that the model continues.")
_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 64, "Tokens to generate.", lower_bound=1)
_TEMPERATURE = flags.DEFINE_float("temperature", 0.0, "0 takes the likeliest token.", lower_bound=0)
_SEED = flags.DEFINE_integer("seed", 0, "Of what is drawn.")
_QUANTIZATION = flags.DEFINE_string("quantization", None, "JSON or a method's name; default: as the folder is.")
_EP = flags.DEFINE_integer("ep", 1, "Devices that the experts are split over.", lower_bound=1)
_LOW_LATENCY = flags.DEFINE_bool(
    "low_latency", False, "Decode steps keep the buffers that tokens are received into; GPUs of one host, with --ep."
)
_DTYPE = flags.DEFINE_enum("dtype", None, ["bfloat16", "float32"], "What the model computes in; default: its config's.")
_INPUT_SCALES = flags.DEFINE_enum(
    "input_scales", "stored", ["stored", "per_token"], "Of layers with NVFP4 activations."
)
_JSON = flags.DEFINE_string("json", None, "File for the text and the numbers.")


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    if _EP.value > len(jax.devices()):
        raise app.UsageError(f"--ep={_EP.value}: JAX sees {len(jax.devices())} devices")
    options = shared_flags.block_graph_options()
    if _LOW_LATENCY.value and (_EP.value < 2 or not options.enabled or _TEMPERATURE.value > 0):
        raise app.UsageError("--low_latency is about decode steps across devices: with --ep, in blocks, not sampled")
    folder = Path(_MODEL.value)
    mesh = jax.make_mesh((_EP.value,), ("ep",), devices=jax.devices()[: _EP.value]) if _EP.value > 1 else None
    start = time.perf_counter()
    try:
        model, config = load_model(
            folder, mesh=mesh, quantization=_QUANTIZATION.value, dtype=_DTYPE.value, input_scales=_INPUT_SCALES.value
        )
    except (ValueError, FileNotFoundError) as error:
        raise app.UsageError(str(error)) from error
    print(f"loaded in {time.perf_counter() - start:.1f} s: {config.to_hf()['model_type']}, {layer_kinds(model)}")
    if mesh is not None:
        wire_format = shared_flags.wire_format("nvfp4")
        configure_experts(model, wire_format=wire_format, low_latency=_LOW_LATENCY.value)
    tokenizer = tokenizer_of(folder, config)
    ids = tokenizer.encode(_PROMPT.value)
    if not ids or max(ids) >= config.vocab_size:
        raise app.UsageError(f"--prompt has {len(ids)} tokens, up to {max(ids, default=0)}; the model knows "
                             f"{config.vocab_size}")  # fmt: skip
    if len(ids) + _NEW_TOKENS.value > config.max_position_embeddings:
        raise app.UsageError(f"{len(ids)} tokens and {_NEW_TOKENS.value} new ones exceed max_position_embeddings="
                             f"{config.max_position_embeddings}")  # fmt: skip
    run = in_blocks if options.enabled and _TEMPERATURE.value == 0 else at_once
    answer, numbers = run(model, ids, options)
    text = tokenizer.decode(until_end(answer, end_token_ids(folder)))
    print(f"\n{_PROMPT.value}{text}\n")
    print(f"prefill: {numbers['prefill_tokens_per_s']:.0f} tokens/s, decoding: "
          f"{numbers['decode_tokens_per_s']:.1f} tokens/s, compiled in {numbers['compile_s']:.1f} s")  # fmt: skip
    if _JSON.value:
        report = {"prompt": _PROMPT.value, "prompt_ids": ids, "text": text, "ids": answer, **numbers}
        Path(_JSON.value).write_text(json.dumps(report, indent=1) + "\n")


def layer_kinds(model: Any) -> str:
    """Classes of the layers, as loading made them."""
    names = {type(getattr(layer.self_attn, "o_proj", None)).__name__ for layer in model.layers}
    experts = {type(block.w13.get_value()).__name__ for block in model.moe_blocks()}
    kinds = ", ".join(sorted(experts)).replace("ArrayImpl", "plain")
    return f"linear layers {', '.join(sorted(names))}, experts {kinds or 'none'}"


def until_end(ids: list[int], ends: set[int]) -> list[int]:
    """The tokens before the first one that ends a text."""
    return ids[: next((i for i, token in enumerate(ids) if token in ends), len(ids))]


def in_blocks(
    model: Any, ids: list[int], options: shared_flags.BlockGraphOptions
) -> tuple[list[int], dict[str, float]]:
    """Greedy, through executables of the token counts that this prompt needs."""
    largest = options.buckets[-1]
    chunks = {largest} if len(ids) > largest else set()
    chunks |= {next(b for b in options.buckets if b >= (len(ids) - 1) % largest + 1)}
    length = len(ids) + _NEW_TOKENS.value
    served = BucketedModel(model, buckets=sorted(chunks), batch_buckets=(1,), max_length=length)
    if options.debug:
        block_report.watch(served.graphs)
    start = time.perf_counter()
    served.warm_up()
    compiled = time.perf_counter() - start
    served.generate([ids], min(2, _NEW_TOKENS.value))  # first calls of everything
    start = time.perf_counter()
    jax.block_until_ready(served.prefill(ids).logits)
    prefill = time.perf_counter() - start
    start = time.perf_counter()
    answer = served.generate([ids], _NEW_TOKENS.value)[0]
    return answer, numbers_of(ids, prefill, time.perf_counter() - start, compiled)


def at_once(model: Any, ids: list[int], options: Any) -> tuple[list[int], dict[str, float]]:
    """In one program for the whole text, with sampling."""
    del options
    prompt = jnp.asarray([ids], jnp.int32)
    sampling: dict[str, Any] = dict(temperature=_TEMPERATURE.value, seed=_SEED.value)

    def seconds(new_tokens):
        start = time.perf_counter()
        out = jax.block_until_ready(generate(model, prompt, max_new_tokens=new_tokens, **sampling))
        return out, time.perf_counter() - start

    first = seconds(1)[1] + seconds(_NEW_TOKENS.value)[1]
    _, prefill = seconds(1)
    out, whole = seconds(_NEW_TOKENS.value)
    return np.asarray(out)[0, len(ids) :].tolist(), numbers_of(ids, prefill, whole, first - prefill - whole)


def numbers_of(ids: list[int], prefill: float, whole: float, compiled: float) -> dict[str, float]:
    """Tokens per second; decoding is what is left of the whole without the prefill."""
    decoding = max(whole - prefill, 1e-9)
    steps = _NEW_TOKENS.value - 1
    return {
        "prefill_tokens_per_s": round(len(ids) / prefill, 1),
        "decode_tokens_per_s": round(steps / decoding, 1) if steps else 0.0,
        "compile_s": round(compiled, 2),
    }


if __name__ == "__main__":
    app.run(main)

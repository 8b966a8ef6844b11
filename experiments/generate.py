"""Text from a checkpoint: python experiments/generate.py --model=DIR --prompt='Once upon a time'

    python experiments/generate.py --model=experiments/checkpoints/tiny_lm --prompt='def read_lines(path):'
    python experiments/generate.py --model=DIR --quantization='{"quantization":"mix_quant",
        "dense_quant_type":"block_wise_fp8","is_moe_quantized":true,"moe_quant_type":"modelopt_fp4"}'

Loads any folder that inspect_checkpoint.py says loads, with the tokenizer of its tokenizer.json (the `tokenizers`
package; a model of at most 256 tokens without one reads bytes), and prints the continuation and tokens per second of
prefill and decoding, compilation apart, where there are enough tokens to measure. --ep splits the experts over devices;
--wire_format, or FD_DISPATCH_USE_FP4, says how tokens cross between them. Without sampling the model runs in blocks
compiled ahead of time (--block_graph and its environment switches, see experiments/harness/block_graph_flags.py), else
as one program; the output says which.
"""

import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from experiments.harness import block_graph_flags, block_report, outputs, rates, script, wire_flag
from experiments.harness.flag_values import finite
from experiments.text.files import check_text, read_text
from experiments.text.tokenizers import tokenizer_of
from fp4jax.checkpoint import load_model
from fp4jax.checkpoint.folder_config import end_token_ids, read_config
from fp4jax.engine import BucketedModel
from fp4jax.models import configure_experts, generate

_DEFAULT_PROMPT = "The meaning of life is"
_MODEL = flags.DEFINE_string("model", None, "Folder in Hugging Face layout; required.", required=True)
_PROMPT = flags.DEFINE_string("prompt", None, f"Text that the model continues; default: '{_DEFAULT_PROMPT}'.")
_PROMPT_FILE = flags.DEFINE_string(
    "prompt_file", None, "File with the text instead, taken whole, its last line end too; -: standard input."
)
_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 64, "Tokens to generate.", lower_bound=1)
_TEMPERATURE = flags.DEFINE_float(
    "temperature", 0.0, "0 takes the likeliest token, more draws one: not in blocks.", lower_bound=0
)
_SEED = flags.DEFINE_integer("seed", 0, "Of what is drawn.", lower_bound=0, upper_bound=2**32 - 1)
_QUANTIZATION = flags.DEFINE_string("quantization", None, "JSON or a method's name; default: as the folder is.")
_EP = flags.DEFINE_integer("ep", 1, "Devices that the experts are split over.", lower_bound=1)
_LOW_LATENCY = flags.DEFINE_bool(
    "low_latency", False, "Decode steps keep the buffers that tokens are received into; GPUs of one host, with --ep."
)
_DTYPE = flags.DEFINE_enum("dtype", None, ["bfloat16", "float32"], "What the model computes in; default: its config's.")
_INPUT_SCALES = flags.DEFINE_enum(
    "input_scales", "stored", ["stored", "per_token"], "Of layers with NVFP4 activations."
)
_JSON = flags.DEFINE_string("json", None, "File for the text and the numbers; default: none is written.")


class Request(NamedTuple):
    """What is to be done, checked before any weight is read."""

    folder: Path
    tokenizer: Any
    prompt: str
    ids: list[int]
    options: block_graph_flags.BlockGraphOptions  # enabled: whether it runs in blocks
    wire_format: str | None  # None: one device, nothing crosses
    ends: set[int]  # tokens that end a text


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    request = checked_request()
    model = loaded_model(request)
    run = in_blocks if request.options.enabled else at_once
    answer, numbers = run(model, request.ids, request.options)
    text = request.tokenizer.decode(until_end(answer, request.ends))
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
    """Of the flags and the small files of the folder.

    Raises:
      app.UsageError: for whatever would fail after the weights are loaded, or be ignored.
    """
    options, ep, wire_format = block_graph_flags.block_graph_options(), _EP.value, None
    if finite("temperature", _TEMPERATURE.value) > 0:
        if asked := block_graph_flags.flags_about_blocks():
            raise app.UsageError(f"{' and '.join(asked)}: blocks take the likeliest token, not with --temperature")
        options = options._replace(enabled=False)
    if _LOW_LATENCY.value and (ep < 2 or not options.enabled):
        raise app.UsageError("--low_latency is about decode steps across devices: with --ep, in blocks, not sampled")
    if ep > 1:
        wire_format = wire_flag.wire_format("nvfp4")
    elif wire_flag.WIRE_FORMAT.value is not None:
        raise app.UsageError("--wire_format says how tokens cross between devices: with --ep")
    if _JSON.value is not None:
        outputs.check_file("json", _JSON.value)
    prompt, source = prompt_of_flags()
    folder = Path(_MODEL.value)
    try:
        config, ends = read_config(folder, _DTYPE.value), end_token_ids(folder)
    except (ValueError, OSError) as error:
        raise app.UsageError(str(error)) from error
    if ep > len(jax.devices()):
        raise app.UsageError(f"--ep={ep}: JAX sees {len(jax.devices())} devices")
    if config.num_experts % ep:
        raise app.UsageError(f"--ep={ep} does not divide the model's {config.num_experts} experts")
    tokenizer = tokenizer_of(folder, config)
    ids = checked_ids(tokenizer, prompt, source, config)
    return Request(folder, tokenizer, prompt, ids, options, wire_format, ends)


def prompt_of_flags() -> tuple[str, str]:
    """The prompt, and the flag that it comes from."""
    if _PROMPT_FILE.value is None:
        return check_text("prompt", _DEFAULT_PROMPT if _PROMPT.value is None else _PROMPT.value), "--prompt"
    if _PROMPT.value is not None:
        raise app.UsageError("--prompt and --prompt_file exclude each other")
    return read_text("prompt_file", _PROMPT_FILE.value), "--prompt_file"


def checked_ids(tokenizer: Any, prompt: str, source: str, config: Any) -> list[int]:
    """Tokens of the prompt; app.UsageError where the model does not know them, or has no room for them and the new."""
    ids, new = tokenizer.encode(prompt), _NEW_TOKENS.value
    if not ids or max(ids) >= config.vocab_size:
        raise app.UsageError(f"{source} has {len(ids)} tokens, up to {max(ids, default=0)}; the model knows "
                             f"{config.vocab_size}")  # fmt: skip
    if len(ids) + new > config.max_position_embeddings:
        raise app.UsageError(f"{source}: {len(ids)} tokens and {new} new ones exceed max_position_embeddings="
                             f"{config.max_position_embeddings}")  # fmt: skip
    return ids


def loaded_model(request: Request) -> Any:
    """The model of the folder, its experts over --ep devices; says how long that took, and what its layers are."""
    ep, start = _EP.value, time.perf_counter()
    mesh = jax.make_mesh((ep,), ("ep",), devices=jax.devices()[:ep]) if ep > 1 else None
    try:
        model, config = load_model(
            request.folder, mesh=mesh, quantization=_QUANTIZATION.value, dtype=_DTYPE.value,
            input_scales=_INPUT_SCALES.value,
        )  # fmt: skip
    except (ValueError, FileNotFoundError) as error:
        raise app.UsageError(str(error)) from error
    print(f"loaded in {time.perf_counter() - start:.1f} s: {config.to_hf()['model_type']}, {layer_kinds(model)}")
    if mesh is not None:
        configure_experts(model, wire_format=request.wire_format, low_latency=_LOW_LATENCY.value)
    return model


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
    model: Any, ids: list[int], options: block_graph_flags.BlockGraphOptions
) -> tuple[list[int], dict[str, Any]]:
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
    whole = time.perf_counter() - start
    return answer, rates.of_run(len(ids), _NEW_TOKENS.value, prefill, whole, compiled)


def at_once(model: Any, ids: list[int], options: Any) -> tuple[list[int], dict[str, Any]]:
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
    numbers = rates.of_run(len(ids), _NEW_TOKENS.value, prefill, whole, first - prefill - whole)
    return np.asarray(out)[0, len(ids) :].tolist(), numbers


if __name__ == "__main__":
    script.run(main)

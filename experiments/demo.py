"""Runs real text through a Mixture-of-Experts model whose experts and tokens on the wire are in NVFP4.

    make demo
    python experiments/demo.py --output_dir=output/demo          # the same; about 2 minutes on 2 CPU cores

It loads the byte-level model in experiments/checkpoints/tiny_lm and measures bits per byte on held-out text in several
variants: bf16, with its cache of keys and values in FP8 too, W4A16, W4A4, and W4A4 on 1, 2 and 4 devices with the wire
format nvfp4. It reads the bytes on the wire
from the compiled programs, times the stages of one expert layer, and lets the quantized model continue a prompt.
Without GPUs it uses 4 virtual CPU devices. Prints a table, and writes demo.json and demo.png into --output_dir.
"""

import json
import math
import os
import platform
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from flax import nnx
from jax.sharding import AxisType
from tqdm import tqdm

from experiments.harness import outputs, script
from experiments.harness.config_flag import define_config
from experiments.harness.stages import compiler_options, stage_times
from experiments.text.corpora import load_corpus, windows
from experiments.text.evaluation import evaluate
from experiments.text.files import check_text
from fp4jax.attention.cache_formats import FP8
from fp4jax.checkpoint import load_model
from fp4jax.expert_parallel import WireBytes, wire_bytes
from fp4jax.models.expert_setup import configure_experts, quantize_experts
from fp4jax.models.generation import generate
from fp4jax.routing import route

_ROOT = Path(__file__).resolve().parent
_CONFIG = define_config("configs/tiny_lm.py", "File of settings, of which the section `demo` is read.")
_MODEL = flags.DEFINE_string(
    "model", str(_ROOT / "checkpoints" / "tiny_lm"), "Folder of the model: config.json and safetensors."
)
_OUTPUT_DIR = flags.DEFINE_string("output_dir", "output/demo", "Folder for demo.json and demo.png.")
_CORPUS = flags.DEFINE_string("corpus", None, "Folder of text to evaluate on; default: Python's standard library.")
_WINDOWS = flags.DEFINE_integer(
    "windows", None, "Held-out windows to evaluate; default: as many as the config says.", lower_bound=1
)
_PROMPT = flags.DEFINE_string("prompt", "def read_lines(path):\n", "Text that the model continues.")
_NEW_BYTES = flags.DEFINE_integer("new_bytes", 200, "Number of bytes to generate.", lower_bound=1)
_TEMPERATURE = flags.DEFINE_float(
    "temperature", 0.5, "Sampling temperature; 0 takes the likeliest byte.", lower_bound=0
)
_SEED = flags.DEFINE_integer("seed", 0, "Seed of the generated text.")

EP = (1, 2, 4)
STAGES = ("quantize", "dispatch", "permute", "gemm_1_swiglu", "gemm_2", "depermute", "combine")


class Variant(NamedTuple):
    """One way to run the experts.

    Attributes:
      name: its name in the table.
      quantized: whether the expert weights are NVFP4.
      activation_format: the format of both GEMMs' activations.
      wire_format: the format of tokens that cross devices.
      ep: the number of devices; None: one device without a mesh, where nothing is dispatched.
      fp8_cache: whether keys and values go through a cache in FP8, without calibrated scales.
    """

    name: str
    quantized: bool
    activation_format: str = "bf16"
    wire_format: str = "bf16"
    ep: int | None = None
    fp8_cache: bool = False


def variants(num_devices: int) -> list[Variant]:
    """The variants that this many devices can run, in the order of the table."""
    wired = [Variant(f"W4A4 + nvfp4 wire, ep={n}", True, "nvfp4", "nvfp4", n) for n in EP if n <= num_devices]
    plain = [Variant("bf16", False), Variant("bf16, cache in FP8", False, fp8_cache=True)]
    return [*plain, Variant("W4A16", True), Variant("W4A4", True, "nvfp4"), *wired]


def build(variant: Variant, folder: str, calibration: np.ndarray) -> Any:
    """The model of a folder, with its experts as `variant` says.

    Args:
      variant: how the experts run.
      folder: the checkpoint.
      calibration: training text [windows, length], from which the activation scales are computed.
    """
    model, _ = load_model(folder)
    if variant.fp8_cache:
        model.set_cache_dtype(FP8)
    if variant.quantized:
        quantize_experts(model, jnp.asarray(calibration, jnp.int32))
    mesh = None
    if variant.ep is not None:
        mesh = jax.make_mesh((variant.ep,), ("ep",), axis_types=(AxisType.Auto,), devices=jax.devices()[: variant.ep])
    configure_experts(
        model,
        activation_format_1=variant.activation_format,
        activation_format_2=variant.activation_format,
        wire_format=variant.wire_format,
        mesh=mesh,
    )
    return model


def compile_experts(model: Any, tokens: int) -> tuple[jax.stages.Compiled, tuple[Any, ...]]:
    """The experts of the first layer as a compiled program, and arguments to call it with.

    Args:
      model: the model, on a mesh.
      tokens: the number of random tokens, which are split over the devices.
    """
    block = model.moe_blocks()[0]
    graphdef, state = nnx.split(block)
    keys = jax.random.split(jax.random.key(0))
    x = jax.random.normal(keys[0], (tokens, model.config.hidden_size)).astype(model.config.dtype)
    logits = jax.random.normal(keys[1], (tokens, model.config.num_experts))
    routed = route(logits, top_k=model.config.num_experts_per_tok)
    x, routed = jax.device_put((x, routed), jax.NamedSharding(block.mesh, jax.P("ep")))
    program = jax.jit(lambda state, x, routed: nnx.merge(graphdef, state).experts(x, routed))
    return program.lower(state, x, routed).compile(compiler_options()), (state, x, routed)


def bytes_per_token(found: WireBytes, tokens_per_device: int) -> dict[str, float]:
    """Bytes that leave a device, per token of that device and expert layer: for dispatch and for combine."""
    if not found.all_to_alls:
        return {"dispatch": 0.0, "combine": 0.0}
    there, back = (a.bytes * (a.devices - 1) / a.devices / tokens_per_device for a in found.all_to_alls)
    return {"dispatch": there, "combine": back}


def measure(variant: Variant, folder: str, text: np.ndarray, calibration: np.ndarray, settings: Any) -> dict[str, Any]:
    """One row of the table."""
    model = build(variant, folder, calibration)
    start = time.perf_counter()
    result = evaluate(model, text, settings.batch_size, cached=variant.fp8_cache)
    row = {**variant._asdict(), "bits_per_byte": result.bits_per_byte, "dropped": result.dropped}
    row["seconds"] = time.perf_counter() - start
    if variant.ep is not None:
        tokens = settings.batch_size * settings.sequence_length
        row["tokens"] = tokens
        compiled, args = compile_experts(model, tokens)
        row["wire"] = bytes_per_token(wire_bytes(compiled), tokens // variant.ep)
        row["stages_us"] = stage_times(compiled, lambda: compiled(*args), STAGES)
        plain = Variant("bf16", quantized=False, ep=variant.ep)
        reference, _ = compile_experts(build(plain, folder, calibration), tokens)
        row["wire_bf16"] = bytes_per_token(wire_bytes(reference), tokens // variant.ep)
    return row


def table(rows: list[dict[str, Any]]) -> str:
    """The results as aligned text."""
    base = rows[0]["bits_per_byte"]
    lines = [
        f"{'experts':<27}{'bits/byte':>10}{'vs bf16':>9}{'dropped':>9}{'dispatch B/token':>18}{'bf16':>7}{'ratio':>7}"
        f"{'combine':>9}{'s':>7}"
    ]
    for row in rows:
        wire = " " * 41
        if row.get("wire", {}).get("dispatch"):
            there, reference = row["wire"]["dispatch"], row["wire_bf16"]["dispatch"]
            wire = f"{there:>18.0f}{reference:>7.0f}{reference / there:>6.2f}x{row['wire']['combine']:>9.0f}"
        elif "wire" in row:
            wire = f"{'0 (one device)':>18}" + " " * 23
        change = 100 * (row["bits_per_byte"] / base - 1)
        lines.append(
            f"{row['name']:<27}{row['bits_per_byte']:>10.4f}{change:>+8.2f}%{row['dropped']:>9}{wire}{row['seconds']:>7.1f}"
        )
    timed = [row for row in rows if "stages_us" in row]
    if timed:
        names = list(timed[0]["stages_us"])
        width = max(map(len, names)) + 2
        lines += [
            "",
            f"time per stage of one expert layer, milliseconds per call of {timed[0]['tokens']} tokens and device",
        ]
        lines.append(f"{'':<27}" + "".join(f"{name:>{width}}" for name in names))
        for row in timed:
            lines.append(
                f"{row['name']:<27}" + "".join(f"{row['stages_us'][name] / 1000:>{width}.2f}" for name in names)
            )
    return "\n".join(lines)


def text_note(folder: str | None, digest: str) -> str:
    """A line that says which text was evaluated, and whether README's table is about the same text."""
    readme = json.loads((_ROOT / "results" / "cpu" / "demo.json").read_text())["inputs"]["corpus_digest"]
    name = f"the standard library of Python {platform.python_version()}" if folder is None else f"--corpus={folder}"
    same = "the text of README's table"
    other = f"README's table is of another text, digest {readme[:12]}, and has other numbers"
    return f"held-out text: {name}, digest {digest[:12]}; {same if digest == readme else other}"


def plot(rows: list[dict[str, Any]], note: str, path: Path) -> None:
    """Draw how far every variant is from bf16, and the dispatched bytes per token, and write it as PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), width_ratios=(3, 2), layout="constrained")
    base, *others = rows
    names = [row["name"].replace(" wire", "\nwire") for row in others]
    changes = [100 * (row["bits_per_byte"] / base["bits_per_byte"] - 1) for row in others]
    labels = [f"{c:+.2f}%  ({row['bits_per_byte']:.4f})" for c, row in zip(changes, others, strict=True)]
    left.bar_label(left.barh(names, changes, color="tab:blue"), labels, padding=3)
    left.axvline(0, color="black", linewidth=0.8)
    left.invert_yaxis()
    left.margins(x=0.4)  # room for the labels
    left.set_xlabel("held-out bits per byte against bf16, % (lower is better)")
    left.set_title(f"Quality; bf16 has {base['bits_per_byte']:.4f} bits per byte")
    wired = [row for row in rows if row.get("wire", {}).get("dispatch")]
    position = np.arange(len(wired))
    for offset, key, label in ((-0.2, "wire_bf16", "bf16"), (0.2, "wire", "nvfp4")):
        heights = [row[key]["dispatch"] for row in wired]
        right.bar_label(right.bar(position + offset, heights, 0.38, label=label), fmt="%.0f")
    right.set_xticks(position, [f"ep={row['ep']}" for row in wired])
    right.margins(y=0.1)
    right.set(ylabel="bytes per token and layer", title="Dispatch, leaving a device")
    if wired:
        right.legend(title="wire format", loc="upper left")
    else:
        right.text(0.5, 0.5, "one device: no wire", ha="center", transform=right.transAxes)
    figure.supxlabel(note, fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(argv: list[str]) -> None:
    """Measure the variants, print the table, generate text, write the JSON and PNG files."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}; all options are flags (--help lists them)")
    prompt = np.frombuffer(check_text("prompt", _PROMPT.value).encode(), np.uint8)
    output = outputs.check_folder("output_dir", _OUTPUT_DIR.value, "demo.json", "demo.png")
    if not os.path.isfile(os.path.join(_MODEL.value, "config.json")):
        raise app.UsageError(f"--model={_MODEL.value} holds no config.json")
    longest = json.loads(Path(_MODEL.value, "config.json").read_text()).get("max_position_embeddings", math.inf)
    if prompt.size + _NEW_BYTES.value > longest:
        raise app.UsageError(
            f"--new_bytes={_NEW_BYTES.value} and a prompt of {prompt.size} bytes exceed the model's {longest} positions"
        )
    if not math.isfinite(_TEMPERATURE.value):
        raise app.UsageError(f"--temperature={_TEMPERATURE.value} must be finite")
    settings = _CONFIG.value.demo
    jax.config.update("jax_num_cpu_devices", max(EP))  # no effect where JAX runs on GPUs
    output.mkdir(parents=True, exist_ok=True)
    try:
        corpus = load_corpus(_CORPUS.value)
        text = windows(corpus.held_out, settings.sequence_length, _WINDOWS.value or settings.windows)
        calibration = windows(corpus.train, settings.sequence_length, settings.calibration_windows)[:, :-1]
    except ValueError as error:
        raise app.UsageError(f"--corpus={_CORPUS.value}: {error}") from error
    device = jax.devices()[0].device_kind
    print(
        f"{len(jax.devices())} devices ({device}); {text.size - len(text)} bytes of {len(corpus.held_out_files)} "
        f"held-out files; calibration on {calibration.size} bytes of training text"
    )
    rows = []
    with tqdm(variants(len(jax.devices())), unit="variant") as progress:
        for variant in progress:
            progress.set_description(variant.name)
            rows.append(measure(variant, _MODEL.value, text, calibration, settings))
    note = text_note(_CORPUS.value, corpus.digest)
    print(table(rows), note, sep="\n\n")
    left_out = [n for n in EP if n > len(jax.devices())]
    if left_out:
        print(f"ep={', '.join(map(str, left_out))} left out: JAX sees {len(jax.devices())} device(s)")

    last = variants(len(jax.devices()))[-1]
    model = build(last, _MODEL.value, calibration)
    written = generate(
        model, jnp.asarray(prompt[None], jnp.int32), max_new_tokens=_NEW_BYTES.value,
        temperature=_TEMPERATURE.value, seed=_SEED.value,
    )  # fmt: skip
    sample = bytes(np.asarray(written[0], np.uint8)).decode(errors="replace")
    print(f"\n--- {last.name} continues the prompt ---\n{sample}\n---")

    report = {
        "experiment": "demo", "device": device, "num_devices": len(jax.devices()), "jax": jax.__version__,
        "inputs": {"model": Path(_MODEL.value).name, "corpus_digest": corpus.digest, "windows": len(text),
                   "sequence_length": settings.sequence_length, "seed": _SEED.value, "text": note},
        "rows": rows, "sample": sample,
    }  # fmt: skip
    (output / "demo.json").write_text(json.dumps(report, indent=1) + "\n")
    plot(rows, note, output / "demo.png")
    print(f"wrote {output / 'demo.json'} and {output / 'demo.png'}")


if __name__ == "__main__":
    script.run(main)

"""Measures a whole language model on one or more GPUs, beside its floor and beside Hugging Face transformers.

    python experiments/bench_model.py                                  # every model and size; some hours on a GPU
    python experiments/bench_model.py --models=qwen3-30b --layers=8 --prefill=2048 --decode=32 --contexts=1024
    python experiments/bench_model.py --experts=w4a16,w4a4 --dense=bf16,fp8,nvfp4 --peers=
    python experiments/bench_model.py --ranks=1,2 --wire_formats=nvfp4,bf16 --peers=
    JAX_PLATFORMS=cpu python experiments/bench_model.py                # a tiny model: checks that it runs

The model has random weights, experts in NVFP4, and runs as a user runs it, in `engine.BucketedModel` with CUDA graphs:
a prefill of one prompt, and calls of --decode_steps decode steps that follow each other, for requests with different
tokens and a filled cache.
With --layers below the published number all layers have experts. --experts says what the experts' activations are, and
--dense what all linear layers but the experts', the router and the head run as. An empty --prefill= or --decode= leaves
that phase out.

With --ranks above 1 the model runs in the programs of `engine.Engine`: the experts are split over as many GPUs, and
every GPU prefills a prompt of its own, and decodes as many requests as --decode says. Tokens cross between the GPUs as
--wire_formats say. tokens_per_s is that of all GPUs, and kernels, memory and the floor are those of one.
exchange_us_per_layer is the part of the kernels' time that dispatch, combine and the barriers before them take; there
a GPU also waits for the others. wall_over_kernels is the wall time over the sum of all kernels' times.

First, all programs of the model are compiled in a process of its own, for two prefills (2048 and 8192 tokens; CPU: 8
and 16) and two batch sizes (1 and 32; CPU: 1 and 2), with an empty compilation cache of JAX; then once more in another
process, with the programs of the first one in the cache. A third process fills a `ProgramStore`, and a fourth one reads
it. The rows have the phase "compile": seconds, seconds_from_cache and seconds_from_store are those of the first, second
and fourth start without the time to make the weights, programs is the number of compiled programs, and peak_gb is the
peak of the first process. --nocompile leaves them out.

us_per_layer is the wall time of the model without embedding and head, over its layers: both are timed alone, and
subtracted. kernel_us_per_layer and kernels_per_layer are the sum and the number of the layers' kernels, and in_graph is
the share of kernels that CUDA graphs launched. stages comes from a profile of two layers that are compiled once more
without graphs. tokens_per_s is that of the whole model, embedding and head included. peak_gb is the memory that is in
use, and what XLA planned for the largest program. The floor is the time of the weights of the experts hit, the other
weights, and the keys and values, each once, or of the FLOPs, at the rates of a large copy and a large bf16 product of
this run.

transformers is measured first, in a process of its own, with --peer_layers layers of the same sizes: its stack of
decoder layers is called with embedded tokens, so that embedding and head are not in its time. Its tokens_per_s is
computed for as many layers as fp4jax's model has. Its stages are guessed from names of kernels. What does not fit into
memory has a row that says so. Writes bench_model.json and bench_model.png into --output_dir.
"""

import functools
import gc
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from absl import app, flags
from jax.sharding import Mesh
from tqdm import tqdm

from experiments.cases import models as model_cases, rank_calls
from experiments.cases.model_calls import STEPS, Calls, decode_calls, prefill_calls
from experiments.cases.model_compile import compile_columns
from experiments.cases.model_floors import Work
from experiments.cases.model_rows import ask_peer, make_compile_row, make_row, peer_rows, why_no_peer, with_floors
from experiments.cases.model_timing import measure, measure_stages
from experiments.harness import outputs, script, timing
from experiments.harness.cold_start import device_count, will_run_on_gpu
from experiments.harness.flag_values import choices, integers
from experiments.harness.graph_kernels import KEEP_GRAPHS
from experiments.harness.model_report import model_text, plot, size_of
from fp4jax.attention.cache_formats import FP8
from fp4jax.models import configure_experts
from fp4jax.sharded_moe import EP_AXIS

_WIRES = ("nvfp4", "fp8", "bf16")

_MODELS = flags.DEFINE_list(
    "models", None, f"Models, of {', '.join(model_cases.MODELS)}; default: all but tiny (CPU: tiny)."
)
_LAYERS = flags.DEFINE_integer(
    "layers", None, "Decoder layers; default: all of them, and 3 of deepseek-v3.", lower_bound=1
)
_PREFILL = flags.DEFINE_list("prefill", None, "Tokens of the prefills; default: 128,2048,8192,32768 (CPU: 16).")
_DECODE = flags.DEFINE_list("decode", None, "Requests of the decode steps; default: 1,8,32,128 (CPU: 2).")
_CONTEXTS = flags.DEFINE_list(
    "contexts", None, "Filled places of every request in decode; default: 128,1024,8192,32768 (CPU: 16)."
)
_EXPERTS = flags.DEFINE_list("experts", ["w4a16"], f"How experts run, of {', '.join(model_cases.EXPERTS)}.")
_DENSE = flags.DEFINE_list("dense", ["bf16"], f"What linear layers run as, of {', '.join(model_cases.DENSE)}.")
_CACHE_FORMAT = flags.DEFINE_enum("cache_format", "compute", ["compute", "fp8"], "What keys and values are kept in.")
_DECODE_STEPS = flags.DEFINE_integer(
    "decode_steps", 8, "Decode steps of a call; 1 to 24.", lower_bound=1, upper_bound=STEPS
)
_RANKS = flags.DEFINE_list("ranks", ["1"], "Numbers of GPUs that the experts are split over.")
_WIRE_FORMATS = flags.DEFINE_list(
    "wire_formats", ["nvfp4"], f"How tokens cross, of {', '.join(_WIRES)}; --ranks above 1."
)
_PAGE_SIZE = flags.DEFINE_integer("page_size", 64, "Positions of a page of keys and values.", lower_bound=1)
_CHUNK = flags.DEFINE_integer("chunk", 8192, "Tokens per chunk of a longer prefill.", lower_bound=1)
_COMPILE = flags.DEFINE_bool("compile", True, "Also measure how long compiling the whole model takes.")
_PEERS = flags.DEFINE_list("peers", ["transformers"], "Other libraries to measure: transformers, or none.")
_PEER_LAYERS = flags.DEFINE_integer("peer_layers", 8, "The most decoder layers of a peer's model.", lower_bound=1)
_REPEATS = flags.DEFINE_integer("repeats", 10, "Timed rounds; the median counts.", lower_bound=1)
_PROFILE = flags.DEFINE_bool("profile", True, "Also measure kernels and stages.")
_OUTPUT_DIR = flags.DEFINE_string("output_dir", "output/bench_model", "Folder for the JSON and PNG files.")

_INPUTS = (
    "random weights, experts in NVFP4 with activation scales per token in w4a4; random token ids, random keys and "
    "values; wall time of calls that follow each other, median of rounds; transformers in bf16 with fewer layers, its "
    "tokens_per_s computed for the layers of fp4jax's model"
)


class Split(NamedTuple):
    """The number of GPUs that experts are split over, and how tokens cross between them; None: there is one GPU."""

    ranks: int
    wire_format: str | None


class Variant(NamedTuple):
    """A model, the mode of its experts, what its linear layers run as, and how its experts are split."""

    name: str
    experts: str
    dense: str
    split: Split

    def __str__(self) -> str:
        ranks, wire = self.split
        return ", ".join([self.name, self.experts, self.dense, *([] if ranks == 1 else [f"{ranks} GPUs, {wire}"])])


class Plan(NamedTuple):
    """What to measure.

    Attributes:
      models: {name: decoder layers}.
      works: the prefills and decode steps.
      experts: modes of the experts.
      dense: what linear layers run as.
      splits: how the experts are split.
    """

    models: dict[str, int]
    works: list[Work]
    experts: list[str]
    dense: list[str]
    splits: list[Split]

    @property
    def variants(self) -> list[Variant]:
        """Every model that is made."""
        return [Variant(*v) for v in itertools.product(self.models, self.experts, self.dense, self.splits)]


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    folder = outputs.check_folder("output_dir", _OUTPUT_DIR.value, "bench_model.json", "bench_model.png")
    check_ranks()
    rows = rows_of_peers() + rows_of_compiling()  # before JAX takes the GPU's memory
    plan = checked_plan(timing.on_gpu())
    folder.mkdir(parents=True, exist_ok=True)
    ceilings = timing.measure_ceilings()
    rows = with_floors(rows, ceilings)

    def add(*more: dict[str, Any]) -> None:
        rows.extend(with_floors(more, ceilings))
        timing.save_results(folder / "bench_model.json", "bench_model", rows, inputs=_INPUTS, ceilings=ceilings)

    add()
    with tqdm(total=len(plan.variants) * len(plan.works), unit="row") as progress:
        for variant in plan.variants if plan.works else ():
            progress.set_description(f"{variant}: making the model")
            layers, mesh, model = plan.models[variant.name], mesh_of(variant.split.ranks), None
            reason: dict[str, str] = {}
            with timing.noting_out_of_memory(reason, "error"):
                model = make_model(variant, layers, mesh)
            for work in plan.works:
                row = make_row(variant.name, layers, work, "fp4jax", variant.experts, variant.dense, *variant.split)
                row |= {"cache": _CACHE_FORMAT.value, "page_size": _PAGE_SIZE.value}
                progress.set_description(f"{variant}, {work.phase} {size_of(row)}")
                add(row | (reason if model is None else measured(model, work, mesh)))
                progress.update()
            model = None
            gc.collect()  # models hold reference cycles
            jax.clear_caches()
    print(model_text(rows))
    plot(rows, folder / "bench_model.png")
    print(f"wrote {folder}/bench_model.json" + (" and bench_model.png" if plan.works else ""))


def checked_plan(gpu: bool) -> Plan:
    """The plan from the flags, with the defaults for a GPU or for a CPU.

    Raises:
      app.UsageError: a flag has a value that cannot be measured.
    """
    usual = tuple(m for m in model_cases.MODELS if m != "tiny") if gpu else ("tiny",)
    names = choices("models", _MODELS.value, model_cases.MODELS, usual)
    experts = choices("experts", _EXPERTS.value, tuple(model_cases.EXPERTS), tuple(model_cases.EXPERTS)[:1])
    dense = choices("dense", _DENSE.value, model_cases.DENSE, model_cases.DENSE[:1])
    given = lambda flag, on_gpu, on_cpu: flag.value if flag.value is not None else on_gpu if gpu else on_cpu  # noqa: E731
    prefill = integers("prefill", given(_PREFILL, (128, 2048, 8192, 32768), (16,)))
    decode = integers("decode", given(_DECODE, (1, 8, 32, 128), (2,)))
    contexts = integers("contexts", given(_CONTEXTS, (128, 1024, 8192, 32768), (16,)))
    ranks, wires = integers("ranks", _RANKS.value), choices("wire_formats", _WIRE_FORMATS.value, _WIRES, _WIRES[:1])
    splits = [Split(r, wire) for r in ranks for wire in (wires if r > 1 else (None,))]
    works = [Work("prefill", tokens=tokens) for tokens in prefill]
    works += [Work("decode", requests, context=context) for context in contexts for requests in decode]
    if not works and not _COMPILE.value:
        raise app.UsageError("--prefill, --decode, --contexts and --nocompile leave nothing to measure")
    for name in names:
        config: Any = model_cases.model_config(name, 1)
        if indivisible := [r for r in ranks if config.num_experts % r]:
            raise app.UsageError(f"--ranks={indivisible[0]} does not divide the experts of {name}")
        published = model_cases.PUBLISHED[name]
        if (_LAYERS.value or 1) > published["num_hidden_layers"]:
            raise app.UsageError(f"--layers={_LAYERS.value}: {name} has {published['num_hidden_layers']}")
        longest = max([0, *prefill, *(context + STEPS for context in contexts if decode)]) + 1
        if longest > published["max_position_embeddings"]:
            raise app.UsageError(
                f"--prefill and --contexts need {longest} positions, {name} has {published['max_position_embeddings']}"
            )
    layers = {name: _LAYERS.value or model_cases.usual_layers(name) for name in names}
    return Plan(layers, works, experts, dense, splits)


def check_ranks() -> None:
    """Raises app.UsageError if there are not as many devices as --ranks says."""
    most = max(integers("ranks", _RANKS.value))
    if most > 1 and most > (there := device_count()):
        raise app.UsageError(f"--ranks={most}: JAX sees {there} devices")


def rows_of_peers() -> list[dict[str, Any]]:
    """The rows of transformers without their floors; prints how it ran, or why it did not."""
    if not choices("peers", _PEERS.value, ("transformers",), ()):
        return []
    if reason := why_no_peer():
        print(reason)
        return []
    plan, rows = checked_plan(gpu=True), []
    for name, whole in plan.models.items():
        layers = min(whole, _PEER_LAYERS.value)
        answers = ask_peer(name, layers, plan.works, _REPEATS.value, _PROFILE.value)
        print(answers.about)
        rows += peer_rows(name, layers, whole, answers.rows)
    return rows


def rows_of_compiling() -> list[dict[str, Any]]:
    """The rows of compiling without and with JAX's compilation cache; prints where the time of each went."""
    if not _COMPILE.value:
        return []
    plan, rows = checked_plan(will_run_on_gpu()), []
    with tqdm([*itertools.product(plan.models, plan.experts, plan.dense)], unit="model") as progress:
        for name, experts, dense in progress:
            progress.set_description(f"{name}, {experts}, {dense}: compiling")
            columns, about = compile_columns(name, plan.models[name], experts, dense)
            progress.write(about)
            rows.append(make_compile_row(name, plan.models[name], experts, dense) | columns)
    return rows


def mesh_of(ranks: int) -> Mesh | None:
    """The mesh of the first devices; None for one device."""
    return None if ranks == 1 else Mesh(jax.devices()[:ranks], (EP_AXIS,))


def make_model(variant: Variant, layers: int, mesh: Mesh | None) -> Any:
    """A model with random weights, over a mesh if there is one, whose cache is of --cache_format."""
    config = model_cases.model_config(variant.name, layers)
    model = model_cases.random_model(config, variant.experts, variant.dense)
    if mesh is not None:
        configure_experts(model, mesh=mesh, wire_format=variant.split.wire_format)
    if _CACHE_FORMAT.value == "fp8":
        model.set_cache_dtype(FP8)
    return model


def measured(model: Any, work: Work, mesh: Mesh | None = None) -> dict[str, Any]:
    """The measured columns of fp4jax's row, or the `error` of a row that ran out of memory."""
    gc.collect()  # compiled models hold reference cycles, and their caches with them
    failures: dict[str, str] = {}
    found: dict[str, Any] = {}
    make = maker_of(work, mesh)
    with timing.noting_out_of_memory(failures, "error"):
        calls = make(model, KEEP_GRAPHS if timing.on_gpu() else None)
        layers, weights = len(model.layers), model_cases.state_bytes(model)
        ranks = 1 if mesh is None else mesh.size
        found = measure(calls, layers, work.rows * ranks, _REPEATS.value, weights, _PROFILE.value)
    calls = None  # frees its cache
    if failures or not _PROFILE.value:
        return found | failures
    gc.collect()
    with timing.noting_out_of_memory({}, "stages"):  # then the row has its time, and no stages
        found["stages"] = measure_stages(make, model)
    return found


def maker_of(work: Work, mesh: Mesh | None) -> Callable[[Any, Any], Calls]:
    """The function that makes the calls of this work from a model and options for XLA."""
    prefill: Any = prefill_calls if mesh is None else functools.partial(rank_calls.prefill_calls, mesh=mesh)
    decode: Any = decode_calls if mesh is None else functools.partial(rank_calls.decode_calls, mesh=mesh)
    page_size = _PAGE_SIZE.value
    if work.phase == "prefill":
        return lambda model, options: prefill(model, work.tokens, _CHUNK.value, page_size, options)
    steps = _DECODE_STEPS.value
    return lambda model, options: decode(model, work.requests, work.context, steps, page_size, options)


if __name__ == "__main__":
    script.run(main)

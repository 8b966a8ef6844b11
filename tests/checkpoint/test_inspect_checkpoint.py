"""The report on a folder: what it counts, and that it says of every broken folder that it does not load."""

import json

import numpy as np
import pytest
from python_runs import ROOT, run_python
from quantization_sections import REFERENCE
from quantized_folders import EXPERTS, UP, WEIGHT_ONLY, make_folder, plain_folder, put, spoil
from small_folders import edit, loaded_bytes, make_model

from fp4jax.checkpoint import load_model, save_model
from fp4jax.checkpoint.inspect import as_text, inspect_folder

__all__ = ["make_folder", "plain_folder"]  # fixtures

pytestmark = [
    pytest.mark.usefixtures("quick_compile"),
    pytest.mark.filterwarnings("ignore:.*modules are not as the config says"),
]


def test_counts(make_folder):
    folder, _ = make_folder("modelopt")
    edit(folder, put(EXPERTS + "1.gate_proj.weight_scale_2", np.float32(1)))
    edit(folder, put(EXPERTS + "1.up_proj.weight_scale_2", np.float32(0.25)))
    report = inspect_folder(folder)
    assert report["loads"] and not report["problems"]
    assert report["formats"]["modelopt"] == 2  # w13 and w2 of the one layer with experts
    assert report["runs_as"]["modelopt, activations nvfp4"] == 2
    scales = report["scales"]
    assert scales["layers"] == 12 and scales["input_scales_missing"] == 0
    assert sum(scales["gate_up_ratios"]["counts"]) == 4
    assert scales["gate_up_ratios"]["largest"] == 4 and scales["gate_up_ratios"]["counts"][3] >= 1
    assert 0 < scales["largest_block_scale"] <= 384 and scales["four_over_six"]
    edit(folder, spoil(UP + "weight_scale", (0, 0), 0x7E))  # 448
    edit(folder, spoil(UP + "weight_scale", (0, 1), 0))
    scales = inspect_folder(folder)["scales"]
    assert scales["largest_block_scale"] == 448 and not scales["four_over_six"]
    assert scales["zero_block_scales"] == pytest.approx(1 / (8 * 16 * 2 + 4 * 32))
    said = " ".join(as_text(report).split())
    assert "are bf16" in said and "factor: " in said


@pytest.mark.parametrize("kind", ["modelopt", "compressed", "fp8"])
def test_memory_is_what_loading_takes(make_folder, kind):
    folder, _ = make_folder(kind, config=WEIGHT_ONLY.get(kind))
    size = inspect_folder(folder)["bytes_per_device"]
    assert size["experts"] + size["other"] == loaded_bytes(folder)
    half = inspect_folder(folder, ep=2)["bytes_per_device"]
    assert half["experts"] == size["experts"] / 2 and half["other"] == size["other"]
    assert "3 devices" in inspect_folder(folder, ep=3)["problems"][0]


def test_what_is_quantized_while_loading(tmp_path):
    save_model(*make_model(), tmp_path)
    mixed = {"quantization": "mix_quant", "dense_quant_type": "block_wise_fp8", "moe_quant_type": "modelopt_fp4"}
    report = inspect_folder(tmp_path, quantization=mixed)
    assert report["runs_as"]["nvfp4, from bf16, activations nvfp4"] == 2
    assert report["runs_as"]["block_wise_fp8, from bf16"] == 11  # 2 x 4 of attention, 3 of the dense MLP
    assert inspect_folder(tmp_path)["runs_as"] == {"bf16": len(report["formats"]) and report["formats"]["bf16"]}
    refused = inspect_folder(tmp_path, quantization=REFERENCE)
    assert not refused["loads"] and "needs a quantization config" in refused["problems"][0]


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.pop(UP + "weight_scale"),
        lambda t: t.pop(UP + "weight"),
        lambda t: t.pop(UP + "input_scale"),
        lambda t: t.update(extra=np.ones(2, np.float32)),
        put(UP + "weight_scale_2", np.float32(0)),
        put(UP + "weight_scale_2", np.float32(np.inf)),
        put(UP + "input_scale", np.float32(-1)),
        put(UP + "weight", np.ones((16, 8), np.uint8)),
        spoil(UP + "weight_scale", (3, 1), 0x7F),
    ],
)
def test_what_does_not_load_is_said_not_to(make_folder, change):
    folder, _ = make_folder("modelopt")
    assert inspect_folder(folder)["loads"]
    edit(folder, change)
    report = inspect_folder(folder)
    assert not report["loads"] and any("extra" in p or UP in p for p in report["problems"])
    assert as_text(report).startswith(f"{folder}: DOES NOT LOAD")
    with pytest.raises(ValueError, match=r"extra|up_proj"):
        load_model(folder)


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [
        (0, "0.00 MiB"),
        (3 * 2**18, "0.75 MiB"),
        (2**30 // 100, "10.24 MiB"),
        (2**30 // 100 + 1, "0.01 GiB"),
        (5 * 2**29, "2.50 GiB"),
    ],
)
def test_small_sizes_are_in_mib(num_bytes, text):
    report = inspect_report(bytes_per_device={"experts": num_bytes, "other": 0, "ep": 4})
    assert f"memory per device with ep=4: {text}, of which experts {text}" in as_text(report).splitlines()


def inspect_report(**changes):
    """A report on a folder without NVFP4 layers."""
    report = {
        "folder": "DIR", "loads": True, "problems": [], "model_type": "qwen3_moe", "plan": "experts: bf16",
        "formats": {"bf16": 3}, "runs_as": {"bf16": 3}, "disagreements": [], "scales": {"layers": 0},
        "bytes_per_device": {"experts": 0, "other": 0, "ep": 1},
    }  # fmt: skip
    return {**report, **changes}


def test_no_line_is_endless_and_what_is_left_out_is_counted():
    """Plans of many lines, and lines of many names."""
    ignored = [f"model.layers.{i}.mlp.gate" for i in range(94)]
    plan = "\n".join([*(f"model.layers.{i}: nvfp4" for i in range(94)), f"as they are: {', '.join(ignored)}"])
    differ = [f"model.layers.{i}: the config says one thing and the tensors {'quite ' * 20}another" for i in range(30)]
    text = as_text(inspect_report(plan=plan, disagreements=differ, problems=differ[:11], loads=False))
    lines = text.splitlines()
    assert max(map(len, lines)) <= 100 and len(lines) < 90
    assert sum(line.startswith("config and tensors differ:") for line in lines) == 10 and "... and 20 more" in lines
    assert sum(line.startswith("  problem: ") for line in lines) == 10 and "  ... and 1 more" in lines
    joined = " ".join(text.split())
    named = [name for name in ignored if f"{name}," in joined or f"{name} and" in joined]
    assert named == ignored[:10] and f"{ignored[9]} and 84 more" in joined
    assert f"... and {len(plan.splitlines()) - 1 - 10} more" in lines  # of the plan, whose last line is shown


def test_the_script(make_folder, tmp_path_factory):
    folder, _ = make_folder("modelopt")
    out = tmp_path_factory.mktemp("out") / "report.json"

    def run(*arguments):
        return run_python(ROOT / "experiments" / "inspect_checkpoint.py", f"--model={folder}", *arguments)

    done = run(f"--json={out}", f"--quantization={REFERENCE}", "--ep=2")
    assert done.returncode == 0 and ": loads" in done.stdout, done.stderr
    assert json.loads(out.read_text())["bytes_per_device"]["ep"] == 2
    edit(folder, lambda t: t.pop(UP + "weight"))
    done = run("--json=-")
    assert done.returncode == 1 and not json.loads(done.stdout)["loads"]

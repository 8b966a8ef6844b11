"""Experts of a layer in one NVFP4 tensor, under all names and in both orientations: the model of a folder that has the
same experts apart."""

import jax
import ml_dtypes
import numpy as np
import pytest
from quantized_folders import EXPERTS, WEIGHT_ONLY, make_folder, plain_folder
from small_folders import edit, make_model

from fp4jax.checkpoint import load_model, save_model
from fp4jax.checkpoint.inspect import inspect_folder
from fp4jax.checkpoint.match import model_params
from fp4jax.checkpoint.storage.reader import Reader

__all__ = ["make_folder", "plain_folder"]  # fixtures

pytestmark = [
    pytest.mark.usefixtures("quick_compile"),
    pytest.mark.filterwarnings("ignore:.*modules are not as the config says"),
]
LAYER = EXPERTS.removesuffix(".")
# Where a form keeps (codes, block scales, global scale, input scale).
FORMS = {
    "parameter": ("", "_weight_scale", "_weight_scale_2", "_input_scale"),
    "module": (".weight", ".weight_scale", ".weight_scale_2", ".input_scale"),
    "compressed": (".weight_packed", ".weight_scale", ".weight_global_scale", ".input_global_scale"),
}
APART = {
    "modelopt": ("weight", "weight_scale", "weight_scale_2", "input_scale"),
    "compressed": ("weight_packed", "weight_scale", "weight_global_scale", "input_global_scale"),
}


def stack(tensors, kind, form, *, transposed=False, scales="each"):
    """Replaces the four experts of layer 0 by stacked tensors.

    scales: one global scale per projection ("each"), per expert, or for all; gate, or expert 0, decides for others.
    """
    apart, together = APART[kind], FORMS[form]
    for name, projections in (("gate_up_proj", ("gate", "up")), ("down_proj", ("down",))):
        found = [[[tensors.pop(f"{LAYER}.{e}.{p}_proj.{end}") for p in projections] for e in range(4)] for end in apart]
        for end, values in zip(together[:2], found[:2], strict=True):
            rows = np.stack([np.concatenate(one) for one in values])
            tensors[f"{LAYER}.{name}{end}"] = np.ascontiguousarray(rows.swapaxes(1, 2) if transposed else rows)
        for end, values in zip(together[2:], found[2:], strict=True):
            array = np.array(values, np.float32).reshape(4, -1)
            array = {"each": array, "expert": array[:, 0], "all": array[0, 0]}[scales]
            array = array.reshape(4) if scales == "each" and name == "down_proj" else array
            tensors[f"{LAYER}.{name}{end}"] = np.array(array)


def share_scales(tensors, kind, scales):
    """What `stack(scales=..)` will keep, in the experts apart."""
    for e in range(4):
        for projection in ("gate", "up", "down"):
            for end in APART[kind][2:]:
                source = 0 if scales == "all" else e
                name = "gate" if projection == "up" else projection
                tensors[f"{LAYER}.{e}.{projection}_proj.{end}"] = tensors[f"{LAYER}.{source}.{name}_proj.{end}"].copy()


def assert_same_weights(first, second):
    """Bytes of every leaf."""
    leaves = [jax.tree.leaves({path: p.get_value() for path, p in model_params(m).items()}) for m in (first, second)]
    for a, b in zip(*leaves, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape and np.asarray(a).tobytes() == np.asarray(b).tobytes()


def activation_scales(model):
    block = model.layers[0].mlp
    return float(block.input_scale_1[...]), np.ravel(block.input_scale_2[...]).tolist()


def decoded(model):
    """w13 and w2 of layer 0 in float64, whatever shape the global scales have."""
    out = []
    for name in ("w13", "w2"):
        w = jax.tree.map(np.asarray, getattr(model.layers[0].mlp, name).get_value())
        codes = np.stack([w.qdata & 15, w.qdata >> 4], axis=-1).reshape(*w.qdata.shape[:-1], -1)
        values = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])[codes & 7] * np.where(codes & 8, -1, 1)
        blocks = np.repeat(w.block_scale.astype(np.float64), 16, axis=-1)
        out.append(values * blocks * w.global_scale.astype(np.float64))
    return out


@pytest.mark.parametrize(
    ("kind", "form", "transposed", "scales"),
    [
        ("modelopt", "parameter", False, "each"),
        ("modelopt", "parameter", True, "all"),  # ModelOpt's export of models that multiply x @ W
        pytest.param("modelopt", "module", False, "expert", marks=pytest.mark.slow),
        pytest.param("compressed", "compressed", False, "each", marks=pytest.mark.slow),
        ("compressed", "compressed", True, "expert"),
    ],
)
def test_the_model_of_the_folder_with_experts_apart(make_folder, make_mesh, kind, form, transposed, scales):
    folder, _ = make_folder(kind)
    if scales != "each":
        edit(folder, lambda t: share_scales(t, kind, scales))
    apart, _ = load_model(folder)
    edit(folder, lambda t: stack(t, kind, form, transposed=transposed, scales=scales))
    model, _ = load_model(folder)
    for found, expected in zip(decoded(model), decoded(apart), strict=True):
        np.testing.assert_array_equal(found, expected)
    assert activation_scales(model) == activation_scales(apart)
    assert_same_weights(load_model(folder, mesh=make_mesh(2))[0], model)
    report = inspect_folder(folder)
    assert report["loads"] and report["scales"]["layers"] == 2 and report["scales"]["input_scales_missing"] == 0
    assert sum(report["scales"]["gate_up_ratios"]["counts"]) == (4 if scales == "each" else 0)


def test_each_device_reads_only_its_experts(make_folder, make_mesh, monkeypatch):
    folder, _ = make_folder("modelopt", config=WEIGHT_ONLY["modelopt"])
    edit(folder, lambda t: stack(t, "modelopt", "parameter"))
    asked = {}
    read = Reader.read

    def record(self, name, rows=slice(None)):
        asked.setdefault(name.removeprefix(f"{LAYER}."), []).append(rows)
        return read(self, name, rows)

    monkeypatch.setattr(Reader, "read", record)
    load_model(folder, mesh=make_mesh(4))
    for name in ("gate_up_proj", "gate_up_proj_weight_scale", "down_proj", "down_proj_weight_scale"):
        assert {(rows.start, rows.stop) for rows in asked[name]} == {(e, e + 1) for e in range(4)}, name


def test_plain_experts_in_the_other_orientation(tmp_path):
    """[E, H, 2I] and [E, I, H], as the models of some families have them; H = 2I here, so down_proj tells."""
    save_model(*make_model(), tmp_path)
    expected, _ = load_model(tmp_path)

    def change(tensors):
        take = lambda e, name: tensors.pop(f"{LAYER}.{e}.{name}_proj.weight")  # noqa: E731
        gate_up = [np.concatenate([take(e, "gate"), take(e, "up")]).T for e in range(4)]
        tensors[f"{LAYER}.gate_up_proj"] = np.ascontiguousarray(np.stack(gate_up))
        tensors[f"{LAYER}.down_proj"] = np.ascontiguousarray(np.stack([take(e, "down").T for e in range(4)]))

    edit(tmp_path, change)
    assert_same_weights(load_model(tmp_path)[0], expected)


def test_experts_behind_their_projections(make_folder):
    """experts.gate_proj.0 instead of experts.0.gate_proj: what some versions of ModelOpt write."""
    folder, _ = make_folder("modelopt")
    expected, _ = load_model(folder)

    def change(tensors):
        for name in [name for name in tensors if name.startswith(EXPERTS)]:
            expert, projection, end = name.removeprefix(EXPERTS).split(".")
            tensors[f"{LAYER}.{projection}.{expert}.{end}"] = tensors.pop(name)

    edit(folder, change)
    model, _ = load_model(folder)
    assert_same_weights(model, expected)
    assert activation_scales(model) == activation_scales(expected)
    edit(folder, lambda t: t.pop(f"{LAYER}.up_proj.2.weight"))
    with pytest.raises(ValueError, match=r"1 tensors missing: .*experts\.up_proj\.2\.weight; 0 unexpected"):
        load_model(folder)


GATE_UP = f"{LAYER}.gate_up_proj"


def spoil_block(tensors):
    values = tensors[GATE_UP + "_weight_scale"].copy()
    values.view(np.uint8)[3, 0, 0] = 0xFF
    tensors[GATE_UP + "_weight_scale"] = values


@pytest.mark.parametrize(
    ("change", "messages"),
    [
        (lambda t: t.pop(GATE_UP + "_weight_scale"), ["1 tensors missing", GATE_UP + "_weight_scale"]),
        (lambda t: t.pop(GATE_UP + "_input_scale"), [GATE_UP + "_input_scale is missing"]),
        (lambda t: t.update({GATE_UP: t[GATE_UP][:3]}), [GATE_UP, "(3, 32, 16)", "(4, 32, 16)"]),
        (
            lambda t: t.update({GATE_UP: np.ascontiguousarray(t[GATE_UP].swapaxes(1, 2))}),
            [GATE_UP + "_weight_scale", "(4, 32, 2)", "(4, 2, 32)"],
        ),
        (
            lambda t: t.update({GATE_UP + "_weight_scale_2": np.ones((4, 3), np.float32)}),
            [GATE_UP + "_weight_scale_2", "(4, 3)", "(4, 2)"],
        ),
        (
            lambda t: t.update({GATE_UP + "_weight_scale_2": np.array([[1, 1], [1, 0], [1, 1], [1, 1]], np.float32)}),
            [GATE_UP + "_weight_scale_2", "0.0", "positive"],
        ),
        (
            lambda t: t.update({GATE_UP + "_input_scale": np.array([1, 1, np.nan, 1], np.float32)}),
            [GATE_UP + "_input_scale = nan"],
        ),
        (spoil_block, [GATE_UP + "_weight_scale", "nan"]),
        (lambda t: t.update({GATE_UP: t[GATE_UP].view(ml_dtypes.float8_e4m3fn)}), [GATE_UP, "F8_E4M3", "expected"]),
        (lambda t: t.update({f"{EXPERTS}0.up_proj.weight": np.ones((16, 16), np.uint8)}), ["1 unexpected"]),
    ],
)
def test_broken_stacks_are_named(make_folder, change, messages):
    folder, _ = make_folder("modelopt")
    edit(folder, lambda t: stack(t, "modelopt", "parameter"))
    edit(folder, change)
    with pytest.raises(ValueError) as error:
        load_model(folder)
    for message in [*messages, str(folder)]:
        assert message in str(error.value)

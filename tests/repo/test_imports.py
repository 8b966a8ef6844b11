"""Imports point down only: experiments > checkpoint > models > layers > moe > ops > format; kernels are a leaf."""

import ast
import re
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
OURS = ("fp4jax", "pallas_kernels", "configs", "experiments", "tests")

# A module of fp4jax imports modules of lower rows only. A name stands for a module or for a whole subpackage; the
# modules of one subpackage may import each other. `expert_parallel` is the top of the ops: it permutes rows.
LAYERS = (
    {
        "rounding",
        "operands",
        "implementations",
        "hlo_collectives",
        "quant_methods",
        "benchmarking",
        "bucket_planner",
        "bucketed",
        "compiling",
    },
    {"block_graph", "quant_schemas"},
    {"quant_config"},
    {"nvfp4", "scale_layout"},
    {"packed_weights", "low_latency"},
    {"routing", "permute", "grouped_gemm", "swiglu", "wire_formats"},
    {"gemm_swiglu", "all_to_all", "block_fp8"},
    {"expert_parallel"},
    {"moe"},
    {"layers"},
    {"models"},
    {"checkpoint"},
    {"__init__"},
)
# What each top-level package may import of ours, itself apart.
MAY_IMPORT = {
    "fp4jax": {"pallas_kernels"},
    "pallas_kernels": set(),
    "configs": set(),
    "experiments": {"fp4jax", "pallas_kernels", "configs"},
    "tests": set(OURS),
}
FORBIDDEN = "jax.experimental.pallas.triton"  # deprecated lowering: Pallas means Mosaic GPU here


def find_violations(root):
    """One line of text for every broken rule in the Python files of `root`'s packages."""
    found = []
    for package in OURS:
        for path in sorted((root / package).rglob("*.py")):
            module = ".".join(path.relative_to(root).with_suffix("").parts)
            tree = ast.parse(path.read_text(encoding="utf-8"))
            names = [name for node in ast.walk(tree) for name in _imported_names(node, module)]
            found += [f"{module}: {problem}" for problem in _problems(root, package, module, tree, names)]
    return found


def _imported_names(node, module):
    """Absolute dotted names that an import statement brings in: `from a import b` is "a.b", module or not."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        base = module.split(".")[: -node.level] if node.level else []
        base += node.module.split(".") if node.module else []
        return [".".join([*base, alias.name]) for alias in node.names]
    return []


def _problems(root, package, module, tree, names):
    if "utils" in module.split("."):
        yield "no module is called utils"
    if module.endswith("__init__") and not all(_is_reexport(node) for node in tree.body):
        yield "an __init__ only re-exports"
    attributes = {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    if any(f"{name}.".startswith(f"{FORBIDDEN}.") for name in {*names, *attributes}):
        yield f"uses {FORBIDDEN}"
    for name in names:
        top = name.split(".")[0]
        if top in OURS:
            if top != package and top not in MAY_IMPORT[package]:
                yield f"{package} must not import {name}"
            if top == package == "fp4jax":
                yield from _layer_problems(root, module, name)
        elif package == "configs" and top != "ml_collections":
            yield f"configs import ml_collections only, not {name}"


def _layer_problems(root, module, name):
    source, target = module.split(".")[1], _member(root, name)
    ranks = {member: rank for rank, layer in enumerate(LAYERS) for member in layer}
    for member in (source, target):
        if member not in ranks:
            yield f"give {member!r} a place in LAYERS of tests/repo/test_imports.py"
            return
    same_subpackage = source == target and (root / "fp4jax" / source).is_dir()
    if ranks[target] >= ranks[source] and not same_subpackage:
        yield f"{source} must not import {name}, which is not below it"


def _member(root, name):
    """The module or subpackage of fp4jax that a name is taken from; "__init__" for a name re-exported by fp4jax."""
    parts = name.split(".")
    if len(parts) > 1 and ((root / "fp4jax" / parts[1]).is_dir() or (root / "fp4jax" / f"{parts[1]}.py").is_file()):
        return parts[1]
    return "__init__"


def _is_reexport(node):
    if isinstance(node, ast.Assign):
        return all(isinstance(t, ast.Name) and t.id in ("__all__", "__version__") for t in node.targets)
    is_docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    return is_docstring or isinstance(node, ast.Import | ast.ImportFrom)


def test_repository_keeps_the_rules():
    assert len(list((ROOT / "fp4jax").rglob("*.py"))) > 10  # the checker looks at the right folder
    assert find_violations(ROOT) == []


@pytest.mark.parametrize(
    ("path", "code", "message"),
    [
        ("fp4jax/nvfp4.py", "from fp4jax.permute import permute_to_masked", "must not import fp4jax.permute."),
        ("fp4jax/nvfp4.py", "from fp4jax import permute", "must not import fp4jax.permute"),
        ("fp4jax/nvfp4.py", "from . import permute", "must not import fp4jax.permute"),
        ("fp4jax/nvfp4.py", "def f():\n    import fp4jax.moe as m", "must not import fp4jax.moe"),
        ("fp4jax/permute.py", "from fp4jax import swiglu", "must not import fp4jax.swiglu"),
        ("fp4jax/permute.py", "from fp4jax.expert_parallel import dispatch", "must not import fp4jax.expert_parallel"),
        ("fp4jax/permute.py", "from fp4jax import NVFP4Tensor", "must not import fp4jax.NVFP4Tensor"),
        ("fp4jax/models/dense.py", "from ..checkpoint.load import load_model", "must not import fp4jax.checkpoint"),
        ("fp4jax/moe.py", "import experiments.demo", "fp4jax must not import experiments.demo"),
        ("fp4jax/surprise.py", "from fp4jax import nvfp4", "give 'surprise' a place"),
        ("fp4jax/models/utils.py", "", "no module is called utils"),
        ("fp4jax/checkpoint/__init__.py", "def f(): pass", "only re-exports"),
        ("pallas_kernels/gemm.py", "from fp4jax.nvfp4 import quantize", "pallas_kernels must not import fp4jax"),
        ("pallas_kernels/gemm.py", "from jax.experimental.pallas import triton as plt", "uses jax.experimental.pallas"),
        (
            "pallas_kernels/gemm.py",
            "import jax\njax.experimental.pallas.triton.load(x)",
            "uses jax.experimental.pallas",
        ),
        ("configs/tiny.py", "import jax", "configs import ml_collections only, not jax"),
        ("configs/tiny.py", "from fp4jax import moe", "configs must not import fp4jax.moe"),
        ("experiments/demo.py", "from tests.oracles import quantize", "experiments must not import tests"),
    ],
)
def test_checker_catches_a_planted_violation(tmp_path, path, code, message):
    for name in ("permute", "swiglu", "moe", "expert_parallel", "checkpoint/load"):
        _plant(tmp_path, f"fp4jax/{name}.py", "")
    _plant(tmp_path, path, code)
    assert [message in line for line in find_violations(tmp_path)] == [True]


def test_checker_accepts_what_is_allowed(tmp_path):
    _plant(tmp_path, "fp4jax/permute.py", "from fp4jax.nvfp4 import quantize\nimport pallas_kernels.permute")
    _plant(tmp_path, "fp4jax/nvfp4.py", "import jax.experimental.pallas.mosaic_gpu as plgpu")
    _plant(tmp_path, "fp4jax/expert_parallel/exchange.py", "from fp4jax import permute")
    _plant(tmp_path, "fp4jax/checkpoint/load.py", "from . import names\nfrom fp4jax.models.qwen3_moe import Qwen3Moe")
    _plant(tmp_path, "fp4jax/checkpoint/names.py", "")
    _plant(tmp_path, "fp4jax/models/qwen3_moe.py", "from fp4jax.layers import Linear")
    _plant(tmp_path, "fp4jax/layers.py", "")
    _plant(
        tmp_path, "fp4jax/__init__.py", '"""Doc."""\nfrom fp4jax import nvfp4\n__version__ = "1"\n__all__ = ["nvfp4"]'
    )
    _plant(tmp_path, "configs/tiny.py", "from ml_collections import ConfigDict")
    _plant(tmp_path, "experiments/demo.py", "import fp4jax\nfrom configs import tiny")
    assert find_violations(tmp_path) == []


def _plant(root, path, code):
    file = root / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(code, encoding="utf-8")


@pytest.mark.parametrize(("package", "extras"), [("fp4jax", []), ("experiments", ["bench", "peers"])])
def test_third_party_imports_are_declared(package, extras):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    requirements = project["dependencies"] + [r for e in extras for r in project["optional-dependencies"][e]]
    distributions = {re.match(r"[\w-]+", requirement)[0] for requirement in requirements}
    declared = {{"absl-py": "absl"}.get(name, name) for name in distributions}
    imported = {
        name.split(".")[0]
        for path in (ROOT / package).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        for name in _imported_names(node, ".".join(path.relative_to(ROOT).with_suffix("").parts))
    }
    assert imported - declared - sys.stdlib_module_names - set(OURS) == set()

"""Imports point down only: rooms (folders) have an order, and within a room no module needs itself by a detour."""

import ast
import re
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# Rooms of each package from low to high. A room is a folder, "." are the modules beside the folders, and one of them
# that stands elsewhere in the order has its own name. A module imports its own room and those of rows before.
ROOMS = {
    "fp4jax": [
        {"quant_config", "block_graph"},
        {"."},
        {"grouped_gemm", "expert_parallel", "attention"},
        {"moe_config"},
        {"experts"},
        {"moe"},
        {"sharded_moe"},
        {"layers"},
        {"models"},
        {"checkpoint"},
        {"engine"},
        {"__init__"},
    ],
    "pallas_kernels": [{"simt"}, {"rows"}, {"fp8"}, {"gemm", "exchange", "attention"}, {"__init__"}],
    "experiments": [{"harness"}, {"cases", "text"}, {"training"}, {"."}],
    "configs": [{"."}],
    "tests": [],
}
# What each package may import of ours, itself apart.
MAY_IMPORT = {
    "fp4jax": {"pallas_kernels"},
    "pallas_kernels": set(),
    "configs": set(),
    "experiments": {"fp4jax", "pallas_kernels", "configs"},
    "tests": set(ROOMS),
}
# These know of no kernels: a plan of a config, and compiled functions of any kind.
WITHOUT_KERNELS = ("fp4jax.quant_config", "fp4jax.block_graph")
FORBIDDEN = "jax.experimental.pallas.triton"  # deprecated lowering: Pallas means Mosaic GPU here


def find_violations(root):
    """One line of text for every broken rule in the Python files of `root`'s packages."""
    found = []
    for package in ROOMS:
        needs = {}
        for path in sorted((root / package).rglob("*.py")):
            module = ".".join(path.relative_to(root).with_suffix("").parts)
            tree = ast.parse(path.read_text(encoding="utf-8"))
            names = [name for node in ast.walk(tree) for name in _imported_names(node, module)]
            found += [f"{module}: {problem}" for problem in _problems(root, package, module, tree, names)]
            needs[module] = {_module(root, name) for name in names if name.split(".")[0] == package} - {module}
        found += [f"a circle: {' needs '.join(circle)}" for circle in _circles(needs)]
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
        if top in ROOMS:
            if top != package and top not in MAY_IMPORT[package]:
                yield f"{package} must not import {name}"
            if top == "pallas_kernels" and module.startswith(WITHOUT_KERNELS):
                yield f"must not import {name}"
            if top == package and ROOMS[package]:
                yield from _order_problems(root, module, name)
        elif package == "configs" and top != "ml_collections":
            yield f"configs import ml_collections only, not {name}"


def _order_problems(root, module, name):
    package = module.split(".")[0]
    ranks = {room: rank for rank, row in enumerate(ROOMS[package]) for room in row}
    source, target = _room(root, module, ranks), _room(root, _module(root, name), ranks)
    for room in (source, target):
        if room not in ranks:
            yield f"give the room {room!r} a place in ROOMS of tests/repo/test_imports.py"
            return
    if ranks[target] >= ranks[source] and target != source:
        yield f"{source} must not import {name}, which is not below it"


def _room(root, module, ranks):
    package, *rest = module.split(".")
    if not rest:
        return "__init__"
    if rest[0] in ranks or (root / package / rest[0]).is_dir():
        return rest[0]
    return "."


def _module(root, name):
    """The module that a dotted name is in; a package where the name is one that its __init__ re-exports."""
    parts = name.split(".")
    while len(parts) > 1 and not ((root / Path(*parts)).is_dir() or (root / Path(*parts)).with_suffix(".py").is_file()):
        parts.pop()
    return ".".join(parts)


def _circles(needs):
    """Circles in the graph module -> modules that it imports; an __init__ stands for its package."""
    graph = {module.removesuffix(".__init__"): set(others) for module, others in needs.items()}
    done, found = set(), []

    def visit(module, way):
        if module in way:
            found.append([*way[way.index(module) :], module])
        elif module not in done:
            for other in sorted(graph.get(module, ())):
                visit(other, [*way, module])
            done.add(module)

    for module in sorted(graph):
        visit(module, [])
    return found


def _is_reexport(node):
    if isinstance(node, ast.Assign):
        return all(isinstance(t, ast.Name) and t.id in ("__all__", "__version__") for t in node.targets)
    is_docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    return is_docstring or isinstance(node, ast.Import | ast.ImportFrom)


def test_repository_keeps_the_rules():
    assert len(list((ROOT / "fp4jax").rglob("*.py"))) > 10  # the checker looks at the right folder
    assert find_violations(ROOT) == []


def test_every_room_of_the_order_exists():
    for package, rows in ROOMS.items():
        for room in set().union(*rows) - {"."}:
            assert (ROOT / package / room).is_dir() or (ROOT / package / f"{room}.py").is_file(), (package, room)


@pytest.mark.parametrize(
    ("path", "code", "message"),
    [
        ("fp4jax/nvfp4.py", "from fp4jax.grouped_gemm import pack_weights", "must not import fp4jax.grouped_gemm."),
        ("fp4jax/nvfp4.py", "from fp4jax import moe", "must not import fp4jax.moe"),
        ("fp4jax/nvfp4.py", "from . import moe", "must not import fp4jax.moe"),
        ("fp4jax/nvfp4.py", "def f():\n    import fp4jax.moe as m", "must not import fp4jax.moe"),
        ("fp4jax/permute.py", "from fp4jax.expert_parallel import dispatch", "must not import fp4jax.expert_parallel"),
        ("fp4jax/permute.py", "from fp4jax import NVFP4Tensor", "must not import fp4jax.NVFP4Tensor"),
        ("fp4jax/expert_parallel/a.py", "from fp4jax.grouped_gemm import gemm", "must not import fp4jax.grouped_gemm"),
        ("fp4jax/models/dense.py", "from ..checkpoint.load import load_model", "must not import fp4jax.checkpoint"),
        ("fp4jax/moe.py", "import experiments.demo", "fp4jax must not import experiments.demo"),
        ("fp4jax/block_graph/graph.py", "from pallas_kernels import simt", "must not import pallas_kernels.simt"),
        ("fp4jax/surprise/room.py", "from fp4jax import nvfp4", "give the room 'surprise' a place"),
        ("fp4jax/models/utils.py", "", "no module is called utils"),
        ("fp4jax/checkpoint/__init__.py", "def f(): pass", "only re-exports"),
        ("fp4jax/swiglu.py", "from fp4jax.permute import permute_to_masked", "a circle: fp4jax.permute needs fp4jax."),
        ("fp4jax/layers/linear.py", "from fp4jax.layers import MLP", "a circle: fp4jax.layers needs fp4jax.layers.li"),
        (
            "pallas_kernels/simt/lanes.py",
            "from pallas_kernels.gemm import roles",
            "must not import pallas_kernels.gemm",
        ),
        ("pallas_kernels/gemm/roles.py", "from fp4jax.nvfp4 import quantize", "pallas_kernels must not import fp4jax"),
        ("pallas_kernels/gemm/roles.py", "from jax.experimental.pallas import triton", "uses jax.experimental.pallas"),
        (
            "pallas_kernels/gemm/roles.py",
            "import jax\njax.experimental.pallas.triton.load(x)",
            "uses jax.experimental.pallas",
        ),
        ("configs/tiny.py", "import jax", "configs import ml_collections only, not jax"),
        ("configs/tiny.py", "from fp4jax import moe", "configs must not import fp4jax.moe"),
        ("experiments/demo.py", "from tests.oracles import quantize", "experiments must not import tests"),
        ("experiments/harness/flags.py", "from experiments import demo", "harness must not import experiments.demo"),
    ],
)
def test_checker_catches_a_planted_violation(tmp_path, path, code, message):
    for name in ("nvfp4", "moe", "expert_parallel/a", "grouped_gemm/gemm", "checkpoint/load"):
        _plant(tmp_path, f"fp4jax/{name}.py", "")
    _plant(tmp_path, "fp4jax/permute.py", "from fp4jax.swiglu import silu")
    _plant(tmp_path, "fp4jax/swiglu.py", "")
    _plant(tmp_path, "fp4jax/layers/__init__.py", "from fp4jax.layers.linear import MLP")
    _plant(tmp_path, "fp4jax/layers/linear.py", "")
    _plant(tmp_path, "pallas_kernels/gemm/roles.py", "")
    _plant(tmp_path, "experiments/demo.py", "")
    _plant(tmp_path, path, code)
    assert [message in line for line in find_violations(tmp_path)] == [True]


def test_checker_accepts_what_is_allowed(tmp_path):
    _plant(tmp_path, "fp4jax/permute.py", "from fp4jax.nvfp4 import quantize\nimport pallas_kernels.rows.permute")
    _plant(tmp_path, "fp4jax/nvfp4.py", "import jax.experimental.pallas.mosaic_gpu as plgpu")
    _plant(tmp_path, "fp4jax/expert_parallel/__init__.py", "from fp4jax.expert_parallel.exchange import dispatch")
    _plant(tmp_path, "fp4jax/expert_parallel/exchange.py", "from fp4jax import permute")
    _plant(tmp_path, "fp4jax/moe.py", "from fp4jax.expert_parallel import dispatch")
    _plant(tmp_path, "fp4jax/checkpoint/load.py", "from . import names\nfrom fp4jax.models.qwen3_moe import Qwen3Moe")
    _plant(tmp_path, "fp4jax/checkpoint/names.py", "")
    _plant(tmp_path, "fp4jax/models/qwen3_moe.py", "from fp4jax.layers import Linear")
    _plant(tmp_path, "fp4jax/layers/__init__.py", "")
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


@pytest.mark.parametrize(("package", "extras"), [("fp4jax", ["serve"]), ("experiments", ["bench", "peers"])])
def test_third_party_imports_are_declared(package, extras):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    requirements = project["dependencies"] + [r for e in extras for r in project["optional-dependencies"][e]]
    distributions = {re.match(r"[\w-]+", requirement)[0] for requirement in requirements}
    modules = {"absl-py": "absl", "prometheus-client": "prometheus_client"}
    declared = {modules.get(name, name) for name in distributions}
    imported = {
        name.split(".")[0]
        for path in (ROOT / package).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        for name in _imported_names(node, ".".join(path.relative_to(ROOT).with_suffix("").parts))
    }
    assert imported - declared - sys.stdlib_module_names - set(ROOMS) == set()

"""Shared set-up: devices, runtime type checks, Hypothesis, and the skips of tests that need a GPU.

The platform is chosen by `JAX_PLATFORMS`. Where that is unset the tests run on the CPU, so that a machine with a GPU
gives the same results as one without, unless the mark expression asks for GPU tests (`pytest -m gpu`).
"""

import gc
import os
import random
import re
import tempfile
import zlib

import hypothesis
import jaxtyping
import numpy as np
import pytest

NUM_CPU_DEVICES = 8

# Before the first import of our packages: every annotated function checks its arguments and its result.
jaxtyping.install_import_hook(["fp4jax", "pallas_kernels"], "type_checks.check")

hypothesis.settings.register_profile(
    "fp4jax",
    deadline=None,  # the first example of a shape pays for its compilation
    max_examples=25,
    derandomize=os.environ.get("CI") == "true",
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("fp4jax")


def pytest_configure(config):
    """Choose the platform and the number of virtual CPU devices before a test module can start a JAX backend."""
    wants_gpu = re.search(r"(?<!not )\b(multi)?gpu\b", config.option.markexpr)
    if not wants_gpu:
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
    # Processes of one run share what they compiled; nothing is left for the next run, whose compiler may be another.
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        cache = tempfile.TemporaryDirectory(prefix="fp4jax_tests_", ignore_cleanup_errors=True)
        config.add_cleanup(cache.cleanup)
        os.environ["JAX_COMPILATION_CACHE_DIR"] = cache.name
        os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
        os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
    import jax

    if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        jax.config.update("jax_num_cpu_devices", NUM_CPU_DEVICES)


def _num_gpus():
    import jax

    return sum(device.platform == "gpu" for device in jax.devices())


def pytest_collection_finish():
    """The garbage collector need not look at what was imported again and again: a twentieth of the time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


def pytest_collection_modifyitems(items):
    """Skip `gpu` and `multigpu` tests where the running platform has not enough GPUs."""
    needs = {}
    for item in items:
        if item.get_closest_marker("gpu"):
            needs[item] = 1
        if marker := item.get_closest_marker("multigpu"):
            needs[item] = marker.args[0] if marker.args else 2
    if not needs:
        return
    have = _num_gpus()
    for item, wanted in needs.items():
        if have < wanted:
            item.add_marker(pytest.mark.skip(reason=f"needs {wanted} GPU(s), JAX sees {have}"))


@pytest.fixture(autouse=True)
def _seed_global_generators():
    random.seed(0)
    np.random.seed(0)


@pytest.fixture
def rng(request):
    """A numpy generator whose seed depends on the test's name only, so that tests can be reordered."""
    return np.random.default_rng(zlib.crc32(request.node.name.encode()))


@pytest.fixture(scope="session")
def make_mesh():
    """`make_mesh(n)`: a mesh of the first n devices along `ep`, with Auto axes; skips where there are fewer."""
    import jax
    from jax.sharding import AxisType

    def make(num_devices, axis_name="ep"):
        devices = jax.devices()
        if len(devices) < num_devices:
            pytest.skip(f"needs {num_devices} devices, JAX sees {len(devices)}")
        return jax.make_mesh((num_devices,), (axis_name,), axis_types=(AxisType.Auto,), devices=devices[:num_devices])

    return make


@pytest.fixture(scope="module")
def quick_compile():
    """For modules that compile again and again. Not for formats, whose bits must survive the optimizations of XLA."""
    import jax

    # Programs for a GPU are compiled as users compile them: where copies and roundings are is up to the optimizations.
    jax.config.update("jax_disable_most_optimizations", jax.default_backend() == "cpu")
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture
def on_the_cpu():
    """Also where the suite runs on a GPU."""
    import jax

    with jax.default_device(jax.devices("cpu")[0]):
        yield


@pytest.fixture(params=["plain", pytest.param("interpreted", marks=pytest.mark.slow)])
def run_kernels(request):
    """What a kernel takes as `interpret`: it runs as plain arithmetic, and slowly in interpret mode."""
    from plain_lanes import plain_kernels

    if request.param == "interpreted":
        yield request.getfixturevalue("interpret")
        return
    with plain_kernels():
        yield None


@pytest.fixture
def interpret():
    """Interpret mode whose race detector must stay silent. An exception inside a kernel leaves state behind."""
    from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call as interpreter
    from jax.experimental.pallas import mosaic_gpu as plgpu

    try:
        yield plgpu.InterpretGPUParams(detect_races=True)
        assert not interpreter.get_races().races_found
    finally:
        interpreter.reset_gpu_interpret_mode_state()

"""Two processes with jax.distributed on CPU (gloo) give the bits of one process with two devices."""

import os
import pathlib
import socket
import subprocess
import sys
import textwrap

import numpy as np

LAYER = textwrap.dedent(
    """
    import sys
    import jax, jax.numpy as jnp, numpy as np
    from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
    processes, rank, address, folder = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
    if processes > 1:
        jax.distributed.initialize(address, processes, rank)
    else:
        jax.config.update("jax_num_cpu_devices", 2)
    from fp4jax.moe import MoEConfig, MoEWeights, moe_layer
    from fp4jax.nvfp4 import quantize

    assert jax.process_count() == processes and len(jax.devices()) == 2
    rng = np.random.default_rng(11)
    T, E, H, I, K = 16, 4, 64, 32, 2
    mesh = jax.make_mesh((2,), ("ep",), axis_types=(AxisType.Auto,))
    put = lambda a: jax.make_array_from_callback(a.shape, NamedSharding(mesh, P("ep")), lambda index: a[index])
    x = rng.standard_normal((T, H)).astype(jnp.bfloat16)
    ids = rng.integers(-1, E, (T, K)).astype(np.int32)
    weights = rng.random((T, K)).astype(np.float32)
    w13, w2 = (rng.standard_normal(s).astype(np.float32) for s in ((E, 2 * I, H), (E, H, I)))
    packed = MoEWeights(*(quantize(jnp.asarray(w), global_scale="per_expert") for w in (w13, w2)))
    packed = jax.tree.map(lambda a: put(np.asarray(a)), packed)
    for form in ("per_slot", "per_peer"):
        config = MoEConfig(
            num_experts=E, axis_name="ep", form=form, wire_format="nvfp4", activation_format_1="nvfp4",
            activation_format_2="nvfp4",
        )  # fmt: skip
        layer = jax.shard_map(
            lambda *a: moe_layer(*a, config), mesh=mesh, in_specs=(P("ep"),) * 4, out_specs=(P("ep"), P())
        )
        y, stats = jax.jit(layer)(put(x), put(ids), put(weights), packed)
        for shard in y.addressable_shards:
            name = f"{folder}/{form}_{processes}_{shard.index[0].start or 0}.npy"
            np.save(name, np.asarray(shard.data).view(np.uint16))
        assert int(stats.dropped.addressable_data(0)) == 0
    """
)


def test_two_processes_equal_one(tmp_path):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{s.getsockname()[1]}"
    root = pathlib.Path(__file__).parents[2]
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "PYTHONPATH": str(root)}
    env["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"  # it compiles for longer than it runs

    def start(processes, rank):
        command = [sys.executable, "-c", LAYER, str(processes), str(rank), address, str(tmp_path)]
        return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    running = [start(2, 0), start(2, 1), start(1, 0)]
    try:
        logs = [p.communicate(timeout=200)[0] for p in running]
    finally:
        for p in running:
            p.kill()
    assert [p.returncode for p in running] == [0, 0, 0], "\n".join(logs)
    for form in ("per_slot", "per_peer"):
        for start_row in (0, 8):
            together, alone = (np.load(tmp_path / f"{form}_{n}_{start_row}.npy") for n in (2, 1))
            assert np.array_equal(together, alone)
            assert together.any()

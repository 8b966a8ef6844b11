"""Two processes with jax.distributed on CPU (gloo) give the bits of one process with two devices."""

import socket
import textwrap

import numpy as np
import pytest
from python_runs import run_python

LAYER = textwrap.dedent(
    """
    import os, sys
    import jax, jax.numpy as jnp, numpy as np
    from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
    from fp4jax.moe import MoEConfig, MoEWeights, moe_layer
    from fp4jax.nvfp4 import quantize

    (address, folder, form), children = sys.argv[1:], []
    for processes, rank in ((2, 0), (2, 1), (1, 0)):
        children.append(os.fork())
        if not children[-1]:
            break
    else:
        sys.exit(any([os.waitpid(child, 0)[1] for child in children]))
    if processes > 1:
        jax.distributed.initialize(address, processes, rank)
    else:
        jax.config.update("jax_num_cpu_devices", 2)

    assert jax.process_count() == processes and len(jax.devices()) == 2
    rng = np.random.default_rng(11)
    T, E, H, I, K = 16, 4, 64, 32, 2
    mesh = jax.make_mesh((2,), ("ep",), axis_types=(AxisType.Auto,))
    put = lambda a: jax.make_array_from_callback(a.shape, NamedSharding(mesh, P("ep")), lambda index: a[index])
    x = rng.standard_normal((T, H)).astype(jnp.bfloat16)
    ids = rng.integers(-1, E, (T, K)).astype(np.int32)
    weights = rng.random((T, K)).astype(np.float32)
    w13, w2 = (rng.standard_normal(s).astype(np.float32) for s in ((E, 2 * I, H), (E, H, I)))
    packed = MoEWeights(*jax.jit(lambda *ws: [quantize(w, global_scale="per_expert") for w in ws])(w13, w2))
    packed = jax.tree.map(lambda a: put(np.asarray(a)), packed)
    config = MoEConfig(
        num_experts=E, axis_name="ep", form=form, wire_format="nvfp4", activation_format_1="nvfp4",
        activation_format_2="nvfp4",
    )  # fmt: skip
    layer = jax.shard_map(
        lambda *a: moe_layer(*a, config), mesh=mesh, in_specs=(P("ep"),) * 4, out_specs=(P("ep"), P())
    )
    y, stats = jax.jit(layer)(put(x), put(ids), put(weights), packed)
    for shard in y.addressable_shards:
        np.save(f"{folder}/{processes}_{shard.index[0].start or 0}.npy", np.asarray(shard.data).view(np.uint16))
    assert int(stats.dropped.addressable_data(0)) == 0
    """
)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["per_peer", "per_slot"])
def test_two_processes_equal_one(tmp_path, form):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{s.getsockname()[1]}"
    settings = {"jax_disable_most_optimizations": True}  # it compiles for longer than it runs
    done = run_python("-c", LAYER, address, tmp_path, form, settings=settings, environment={"XLA_FLAGS": ""})
    assert done.returncode == 0, done.stderr
    for start_row in (0, 8):
        together, alone = (np.load(tmp_path / f"{n}_{start_row}.npy") for n in (2, 1))
        assert np.array_equal(together, alone)
        assert together.any()

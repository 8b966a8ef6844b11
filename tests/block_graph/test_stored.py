"""Programs in a folder: another process finds them, but not where something that makes them has changed."""

import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache
from python_runs import last_json, run_python
from recurrent import Averaging
from small_models import make_qwen3_moe

from fp4jax.block_graph import ProgramStore, block_graph, check_buckets, make_program, stored
from fp4jax.engine import BucketedModel, Engine
from fp4jax.models import configure_experts
from fp4jax.rounding import flush_subnormals
from fp4jax.swiglu import silu

SIZES = dict(max_requests=2, max_length=32, prefill_buckets=(8,), draws=False)


class Hidden:
    """Pretends to be something that the standard library makes."""

    def __reduce__(self):
        return dict, ()


@pytest.fixture
def store(tmp_path):
    """A store, in a process that leaves JAX's own cache alone for a while."""
    before = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()
    yield ProgramStore(tmp_path / "programs")
    jax.config.update("jax_enable_compilation_cache", before)
    compilation_cache.reset_cache()


def files(store):
    return sorted(path.name for path in store.folder.iterdir())


def made(store, scale=2.0, size=3, options=None, function=silu):
    """How long a small program took to lower, and what it computes; 0 if it was found."""
    x = jax.ShapeDtypeStruct((size,), jnp.float32)
    found = make_program(
        lambda: jax.jit(lambda x: function(x * scale)).lower(x), options=options, store=store, name="Small one",
        made_from=(function, scale), structs=(x,),
    )  # fmt: skip
    np.testing.assert_array_equal(found.program(jnp.ones(size)), function(jnp.ones(size) * scale))
    return found.lowering


def test_a_program_is_found_by_all_that_makes_it(store):
    assert made(store) > 0 and len(files(store)) == 1 and files(store)[0].startswith("small-one-")
    assert made(store) == 0
    assert made(store, scale=3.0) > 0 and made(store, size=4) > 0 and made(store, function=flush_subnormals) > 0
    assert made(store, options={"xla_cpu_enable_fast_math": True}) > 0
    with jax.default_matmul_precision("highest"):
        assert made(store) > 0
    assert made(store) == made(store, scale=3.0) == made(store, size=4) == 0
    assert len(files(store)) == 6


def test_other_code_or_surroundings_make_another_program(store, monkeypatch, make_mesh):
    assert made(store) > 0
    monkeypatch.setenv("XLA_SOMETHING", "1")
    assert made(store) > 0
    monkeypatch.undo()
    with jax.set_mesh(make_mesh(1)):
        assert made(store) > 0
    assert made(store) == 0 and len(files(store)) == 3
    monkeypatch.setattr(stored, "_CODE", (*stored._CODE[:1], "another hash"))
    with pytest.warns(UserWarning, match="files of the library have changed since this process began"):
        assert made(store) > 0
    assert len(files(store)) == 3
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_enable_fast_math=true")  # too late for XLA
    with pytest.warns(UserWarning, match="one is not kept in .*XLA_FLAGS have changed"):
        assert store.path("one", (), ()) is None


def test_the_hash_covers_every_file(monkeypatch, tmp_path):
    package = tmp_path / "somewhere"
    (package / "below").mkdir(parents=True)
    (package / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(stored, "_PACKAGES", ("somewhere",))
    hashes = []
    for content in ("a = 1", "a = 2"):
        for name in ("below/module.py", "below/tuned.json"):
            (package / name).write_text(content)
            hashes.append(stored._code.__wrapped__()[1])
    assert len(set(hashes)) == 4


def test_foreign_code_is_not_kept(store):
    """A function of this test, and a layer of this test in a model."""
    x = jax.ShapeDtypeStruct((3,), jnp.float32)
    for foreign in (lambda: 0, files, Averaging, Hidden()):
        with pytest.warns(UserWarning, match="one is not kept in .*is not the library's own"):
            assert store.path("one", foreign, x) is None
    assert store.path("one", silu, x) is not None
    graph = block_graph(lambda x: x + 1, buckets=(4,), in_axes=(0,), store=store)
    with pytest.warns(UserWarning, match="is not kept in .*<lambda> is not the library's own"):
        np.testing.assert_array_equal(graph(np.zeros(3, np.float32)), np.ones(3))
    assert not files(store)


def test_a_damaged_file_is_made_again(store):
    assert made(store) > 0
    (path,) = store.folder.iterdir()
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)
    with pytest.warns(UserWarning, match="cannot be read, so its program is compiled again"):
        assert made(store) > 0
    assert made(store) == 0


def test_a_folder_that_others_write_into_is_refused(store, tmp_path):
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    with pytest.raises(ValueError, match="nobody else can write"):
        ProgramStore(tmp_path / "open")
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        ProgramStore(tmp_path / "file")
    assert ProgramStore(tmp_path / "new" / "one").folder.stat().st_mode & 0o777 == 0o700


def test_what_is_refused_is_not_saved(store):
    x = jax.ShapeDtypeStruct((3,), jnp.float32)

    # A check must belong to the library, or the program has no file; this one refuses all programs.
    with pytest.raises(TypeError, match="Compiled"):
        make_program(
            lambda: jax.jit(jnp.sin).lower(x), options=None, check=check_buckets, store=store, name="one", structs=(x,)
        )
    assert not files(store)


def test_not_beside_the_cache_of_jax(store, tmp_path):
    jax.config.update("jax_enable_compilation_cache", True)
    with pytest.raises(ValueError, match="one or the other"):
        ProgramStore(tmp_path / "another")


def test_a_program_that_cannot_be_written_runs_all_the_same(store, monkeypatch):
    def full(*_):
        raise OSError("no space left")

    monkeypatch.setattr(stored.os, "replace", full)
    with pytest.warns(UserWarning, match="is not kept.*no space left"):
        assert made(store) > 0
    assert not files(store)
    x = jax.ShapeDtypeStruct((3,), jnp.float32)
    talks = jax.jit(lambda x: jax.debug.print("{}", x))
    with pytest.warns(UserWarning, match="is not kept"):
        make_program(lambda: talks.lower(x), options=None, store=store, name="talks", structs=(x,))
    assert not files(store)


@pytest.mark.slow
def test_another_process_finds_a_model(tmp_path):
    """All programs of a model and of an engine, with the same tokens."""
    code = textwrap.dedent("""
        import json, sys
        sys.path.append("tests/support")
        from small_models import make_qwen3_moe
        from fp4jax.block_graph import ProgramStore
        from fp4jax.engine import BucketedModel, Engine
        model, store = make_qwen3_moe(), ProgramStore(sys.argv[1])
        served = BucketedModel(model, buckets=(8,), batch_buckets=(2,), max_length=32, store=store)
        served.warm_up(progress=False)
        lowered = [took.lowering > 0 for graph in served.graphs for took in graph.stats.seconds]
        engine = Engine(model, max_requests=2, max_length=32, prefill_buckets=(8,), store=store)
        number = engine.submit([1, 2, 3] * 4, 6, temperature=1.0)
        found = served.generate([[1, 2, 3] * 4], 6), engine.run()[number]
        print(json.dumps([lowered, found, len(list(store.folder.iterdir()))]))
    """)
    settings = {"jax_enable_compilation_cache": False}
    (lowered, tokens, count), (later, again, same) = (
        last_json(run_python("-c", code, tmp_path / "programs", settings=settings)) for _ in range(2)
    )
    assert all(lowered) and not any(later) and tokens == again and count == same > 6


@pytest.mark.slow
def test_an_engine_on_a_mesh(store, make_mesh, monkeypatch):
    model = make_qwen3_moe()
    configure_experts(model, mesh=make_mesh(2), wire_format="nvfp4")

    def answers():
        engine = Engine(model, mesh=model.moe_blocks()[0].mesh, store=store, **SIZES)
        numbers = [engine.submit([1, 2, 3, 4], 5), engine.submit([7], 3)]
        found = engine.run()
        return [found[number] for number in numbers]

    first, saved = answers(), files(store)
    assert len(saved) >= 5
    served = BucketedModel(model, buckets=(8,), batch_buckets=(1,), max_length=32, store=store)
    answer = served.generate([[1, 2, 3]], 5)
    assert len(files(store)) == len(saved) + 4  # embedding, layers, head, decode
    monkeypatch.setattr(ProgramStore, "save", None)  # an error if one were made again
    served = BucketedModel(model, buckets=(8,), batch_buckets=(1,), max_length=32, store=store)
    assert answers() == first and served.generate([[1, 2, 3]], 5) == answer

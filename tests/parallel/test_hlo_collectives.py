"""wire_bytes on HLO texts of every form a collective is printed in, and on loops and conditionals around them."""

import pytest

from fp4jax.expert_parallel import wire_bytes
from fp4jax.expert_parallel.hlo_collectives import AllToAll

MODULE = """HloModule jit_f, is_scheduled=true

%region (a: f32[], b: f32[]) -> f32[] {{
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %max = f32[] maximum(%a, %b)
}}
{others}
ENTRY %main.1 (p0: u8[4,16,104]) -> u8[4,16,104] {{
  %p0 = u8[4,16,104]{{2,1,0}} parameter(0)
{body}
}}
"""
GROUPS = "replica_groups={{0,1,2,3}}"
PLAIN = f"  %all-to-all.3 = u8[4,16,104]{{2,1,0}} all-to-all(%p0), channel_id=1, {GROUPS}, dimensions={{0}}"


def module(body, others=""):
    return MODULE.format(body=body, others=others)


@pytest.mark.parametrize(
    "body",
    [
        PLAIN,
        "  ROOT %a = u8[4,16,104]{2,1,0:T(8,128)S(1)} all-to-all(u8[4,16,104]{2,1,0} %p0), "
        "replica_groups=[2,4]<=[8], dimensions={0}",
        "  %a = (u8[1,16,104]{2,1,0}, u8[1,16,104]{2,1,0}, u8[1,16,104]{2,1,0}, /*index=3*/u8[1,16,104]{2,1,0}) "
        "all-to-all(%s, %s, %s, %s), channel_id=1, replica_groups=mesh['ep'=4] {'ep'}, "
        'metadata={op_name="all-to-all(x)"}',
        "  %a = u8[4,16,104]{2,1,0} all-to-all(%p0), replica_groups=mesh['dp'=2,'ep'=4] {'ep'}",
        "  %s = ((u8[4,16,104]{2,1,0}), u8[4,16,104]{2,1,0}) all-to-all-start(%p0), " + GROUPS + ", dimensions={0}\n"
        "  %d = u8[4,16,104]{2,1,0} all-to-all-done(%s)",
        "  %s = ((u8[2,16,104]{2,1,0}, u8[2,16,104]{2,1,0}), (u8[2,16,104]{2,1,0}, u8[2,16,104]{2,1,0}), u32[], u32[]) "
        "all-to-all-start(%p0, %p0), replica_groups={{0,1,2,3},{4,5,6,7}}",
    ],
    ids=["plain", "iota groups", "tuple", "mesh groups", "async sugar", "async tuple"],
)
def test_forms_of_an_all_to_all(body):
    found = wire_bytes(module(body))
    assert found.all_to_alls == (AllToAll("u8", 4 * 16 * 104, 4),)
    assert (found.total, found.crossing, found.scalar_bytes) == (4 * 16 * 104, 3 * 16 * 104, 0)


def test_async_wrapped_in_a_computation_counts_once():
    others = (
        "%async_computation (p: u8[4,16,104]) -> u8[4,16,104] {\n  %p = u8[4,16,104]{2,1,0} parameter(0)\n"
        f"  ROOT %all-to-all.1 = u8[4,16,104]{{2,1,0}} all-to-all(%p), {GROUPS}\n}}\n"
    )
    body = (
        "  %start = ((u8[4,16,104]{2,1,0}), u8[4,16,104]{2,1,0}) async-start(%p0), calls=%async_computation\n"
        "  %update = ((u8[4,16,104]{2,1,0}), u8[4,16,104]{2,1,0}) async-update(%start)\n"
        "  ROOT %done = u8[4,16,104]{2,1,0} async-done(%update)"
    )
    assert wire_bytes(module(body, others)).total == 4 * 16 * 104


def loop(trip_count, more=""):
    others = (
        "%body (t: (s32[], u8[4,16,104])) -> (s32[], u8[4,16,104]) {\n"
        "  %t = (s32[], u8[4,16,104]{2,1,0}) parameter(0)\n  %p0 = u8[4,16,104]{2,1,0} get-tuple-element(%t), index=1\n"
        f"{PLAIN}{more}\n}}\n"
        "%condition (t: (s32[], u8[4,16,104])) -> pred[] {\n  ROOT %c = pred[] constant(false)\n}\n"
    )
    config = f', backend_config={{"known_trip_count":{{"n":"{trip_count}"}}}}' if trip_count else ""
    body = f"  %w = (s32[], u8[4,16,104]{{2,1,0}}) while(%tuple), condition=%condition, body=%body{config}"
    return module(body, others)


def test_loops_multiply_and_unknown_lengths_are_refused():
    combined = f"\n  %r = f32[64]{{0}} all-reduce(%x), channel_id=4, {GROUPS}, to_apply=%region"
    found = wire_bytes(loop(5, combined))
    assert (found.total, found.scalar_bytes) == (5 * 4 * 16 * 104, 5 * 64 * 4)
    with pytest.raises(ValueError, match="loop of unknown length"):
        wire_bytes(loop(None))


def test_a_collective_in_a_conditional_is_refused():
    others = f"%branch (p0: u8[4,16,104]) -> u8[4,16,104] {{\n{PLAIN}\n}}\n"
    body = "  %c = u8[4,16,104]{2,1,0} conditional(%i, %p0, %p0), branch_computations={%region, %branch}"
    with pytest.raises(ValueError, match="inside a conditional"):
        wire_bytes(module(body, others))


def test_scalar_all_reduces_are_reported_apart():
    body = (
        f"{PLAIN}\n  %pmax = f32[] all-reduce(%x), channel_id=1, {GROUPS}, to_apply=%region\n"
        f"  %sums = (s32[], f32[]) all-reduce-start(%x, %y), channel_id=2, {GROUPS}, to_apply=%region\n"
        "  %done = (s32[], f32[]) all-reduce-done(%sums)\n"
        f"  %both = s32[2]{{0}} all-reduce(%z), channel_id=3, {GROUPS}, to_apply=%region"
    )
    found = wire_bytes(module(body))
    assert (found.total, found.scalar_bytes) == (4 * 16 * 104, 20)


@pytest.mark.parametrize(
    "line",
    [
        "  %g = f32[8]{0} all-gather(%x), replica_groups={{0,1}}, dimensions={0}",
        "  %g = f32[65]{0} all-reduce(%x), replica_groups={{0,1}}, to_apply=%region",
        "  %g = f32[2,2]{1,0} all-reduce(%x), replica_groups={{0,1}}, to_apply=%region",
        "  %g = u8[16]{0} ragged-all-to-all(%x), replica_groups={{0,1}}",
        "  %g = (f32[4]{0}, f32[4]{0}) collective-permute-start(%x), source_target_pairs={{0,1}}",
        "  %g = f32[2]{0} reduce-scatter(%x), replica_groups={{0,1}}, to_apply=%region",
    ],
)
def test_unknown_collectives_raise(line):
    with pytest.raises(ValueError, match="unknown collective"):
        wire_bytes(module(line))


def test_texts_that_cannot_be_read_raise():
    with pytest.raises(ValueError, match="no HLO module"):
        wire_bytes("not a program")
    with pytest.raises(ValueError, match="cannot read the devices"):
        wire_bytes(module("  %a = u8[4,16]{1,0} all-to-all(%p0), replica_groups={}"))


def test_a_program_without_collectives_is_zero():
    assert wire_bytes(module("  ROOT %n = u8[4,16,104]{2,1,0} negate(%p0)")).total == 0

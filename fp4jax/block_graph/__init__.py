"""Functions that are compiled ahead of time for a few token counts (buckets) and then run for any number of tokens.

`block_graph` wraps a function, `plan_buckets` chooses the buckets, `compile_all` compiles several wrapped functions.
A `ProgramStore` keeps compiled programs for later processes.
"""

from fp4jax.block_graph.arguments import Bucketed as Bucketed
from fp4jax.block_graph.graph import BlockGraph as BlockGraph, block_graph as block_graph
from fp4jax.block_graph.planner import (
    REFERENCE_BUCKETS as REFERENCE_BUCKETS,
    check_buckets as check_buckets,
    parse_buckets as parse_buckets,
    plan_buckets as plan_buckets,
    powers_of_two as powers_of_two,
    read_trace as read_trace,
    save_plan as save_plan,
)
from fp4jax.block_graph.programs import make_program as make_program
from fp4jax.block_graph.stats import (
    BlockStats as BlockStats,
    CompileSeconds as CompileSeconds,
    compile_all as compile_all,
)
from fp4jax.block_graph.stored import ProgramStore as ProgramStore

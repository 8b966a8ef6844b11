"""Router: from the logits of a token to its experts and their weights, in one pass.

A warp takes one token at a time. Each of its lanes holds a few neighbouring experts in registers: their scores, and
an integer per expert that orders experts as their biased scores do. In every one of k rounds each lane finds its best
expert, two reductions over the warp find the best one of all and, among equal ones, the first, and its lane takes it
out. Lane r keeps the expert of round r; in the end it computes that expert's score once more and writes both.

Up to some hundred tokens the launch and one trip to memory bound the time, then the instructions of the rounds.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels.simt import lane_math, lanes, launch
from pallas_kernels.simt.hardware import H100_SMS, WARP, WARPS

MAX_EXPERTS = 512
MAX_TOP_K = WARP  # lane r writes the expert of round r
# A row whose selected scores all underflow gets weights 0 instead of 0/0.
MIN_WEIGHT_SUM = 1e-20
# DeepSeek-V3 ranks a group by the sum of its two best biased scores.
SCORES_PER_GROUP = 2
_BLOCKS_PER_SM = 16
# Order of an expert that cannot be chosen any more; below the order of -inf. Where it is selected, it is the second
# alternative: Mosaic GPU takes `where(condition, constant, integers)` for unsigned.
_TAKEN = np.int32(-(2**31))
_LOG2E = np.float32(math.log2(math.e))
_LOG2E_REST = np.float32(math.log2(math.e) - float(_LOG2E))
_LN2 = np.float32(math.log(2))


@dataclasses.dataclass(frozen=True)
class Config:
    """How tokens are routed. The fields are arguments of `fp4jax.routing.route`, which explains them."""

    top_k: int
    scoring: str = "softmax"
    renormalize: bool = True
    num_groups: int = 1
    topk_groups: int = 1
    routed_scaling_factor: float = 1.0

    @property
    def has_groups(self) -> bool:
        """Whether there are experts that cannot be chosen because of their group."""
        return self.topk_groups < self.num_groups


def experts_per_lane(num_experts: int, config: Config) -> int | None:
    """Experts that a lane holds; None if no power of two of lanes could hold a group."""
    least = -(-num_experts // WARP)
    if not config.has_groups:
        return least
    size = num_experts // config.num_groups
    shares = (size >> bits for bits in range(WARP.bit_length()) if size % (1 << bits) == 0)
    return min((share for share in shares if share >= least), default=None)


def check_config(logits: Any, config: Config) -> str | None:
    """None if `route` accepts these logits (array or ShapeDtypeStruct), else what does not fit."""
    if logits.dtype != jnp.float32 or logits.ndim != 2 or logits.size == 0:
        return f"needs f32 logits [T, E], not empty, got {logits.dtype} {logits.shape}"
    if logits.size >= lanes.MAX_INDEX:
        return f"logits {logits.shape} exceed the kernel's 32-bit indices"
    experts = logits.shape[1]
    if experts > MAX_EXPERTS or config.top_k > MAX_TOP_K:
        return f"at most {MAX_EXPERTS} experts and top_k={MAX_TOP_K}, got {experts} and {config.top_k}"
    if experts_per_lane(experts, config) is None:
        return f"{config.num_groups} groups of {experts // config.num_groups} experts do not fit {WARP} lanes"
    return None


def route(
    logits: jax.Array, bias: jax.Array | None, valid: jax.Array | None = None, *, config: Config, interpret: Any = None
) -> tuple[jax.Array, jax.Array]:
    """Returns the experts i32 [T, k] and their weights f32 [T, k], best first.

    Args:
      logits: f32 [T, E].
      bias: f32 [E], added to the scores for the choice; None: no bias.
      valid: bool [T]; tokens where it is False get experts -1. None: all are valid.
      config: see `Config`.
      interpret: see `launch.kernel`.
    """
    tokens, experts = logits.shape
    k = config.top_k
    blocks = min(-(-tokens // WARPS), _BLOCKS_PER_SM * H100_SMS)
    operands = [logits] + ([] if bias is None else [bias]) + ([] if valid is None else [valid.astype(jnp.int32)])

    def body(logits_ref, *refs):
        *optional, ids_ref, weights_ref = refs
        warp = _Warp(experts, config)
        biases = warp.load(optional[0], 0, True) if bias is not None else None

        def step(i, _):
            token = (i * blocks + lanes.block_index()) * WARPS + warp.index
            exists = token < tokens
            scores = warp.scores(warp.load(logits_ref, token, exists))
            order = warp.choice_order(scores.values, biases)
            ids = jnp.where(scores.spoiled, warp.lane, warp.choose(order))
            writes = exists & (warp.lane < k)
            (logit,) = lanes.gather(logits_ref, token * experts + ids, where=writes)
            weights = warp.weights(scores.of(_as_f32(logit)), scores.spoiled)
            if valid is not None:
                (runs,) = lanes.gather(optional[-1], token, where=writes)
                ids = jnp.where(runs != 0, ids, -1)
            lanes.scatter(ids_ref, token * k + warp.lane, [ids.astype(jnp.uint32)], where=writes)
            lanes.scatter(weights_ref, token * k + warp.lane, [lane_math.as_u32(weights)], where=writes)

        lax.fori_loop(0, -(-tokens // (blocks * WARPS)), step, None)

    out = tuple(jax.ShapeDtypeStruct((tokens, k), dtype) for dtype in (jnp.int32, jnp.float32))
    return launch.kernel(body, out, grid=blocks, interpret=interpret)(*operands)


class _Scores:
    """The scores of a token.

    values: the scores of this lane's experts.
    spoiled: in all lanes, whether a score is NaN.
    """

    def __init__(self, logits: list[jax.Array], softmax: bool):
        self._softmax = softmax
        if softmax:  # a NaN, or an infinite maximum, makes the sum NaN
            self._largest = _largest_f32(_tree(jnp.maximum, logits))
            exponentials = [self._exponential(x) for x in logits]
            total = lanes.sum_of_neighbours(_tree(lane_math.add_rn, exponentials), WARP)
            self._factor = lane_math.div_rn(np.float32(1), total)
            self.values = [lane_math.mul_rn(e, self._factor) for e in exponentials]
            self.spoiled = total != total
        else:
            self.values = [_sigmoid(x) for x in logits]
            nan = _tree(jnp.logical_or, [x != x for x in logits])
            self.spoiled = lanes.largest_of_neighbours(nan.astype(jnp.int32), WARP) > 0

    def of(self, logit: jax.Array) -> jax.Array:
        """The score of an expert with this logit, with the same bits as in `values`."""
        if not self._softmax:
            return _sigmoid(logit)
        return lane_math.mul_rn(self._exponential(logit), self._factor)

    def _exponential(self, x):
        return _exp(x - self._largest)


class _Warp:
    """The lanes of a warp and the experts that each of them holds: e = lane * per_lane + 0, 1, 2, ..."""

    def __init__(self, experts: int, config: Config):
        self.experts, self.config = experts, config
        per_lane = experts_per_lane(experts, config)
        assert per_lane is not None, "check_config refuses such groups"
        self.per_lane = per_lane
        thread = lanes.lane_index()
        self.lane = thread & (WARP - 1)
        self.index = thread >> (WARP.bit_length() - 1)
        self.first = self.lane * self.per_lane
        self._exists = [self.first + j < experts for j in range(self.per_lane)]

    def load(self, ref: Any, row: Any, exists: Any) -> list[jax.Array]:
        """The values of this lane's experts in a row of f32 [rows, E], 0 where `exists` is False or there is none."""
        if self.experts % self.per_lane == 0:  # then a lane has `per_lane` experts or none
            at = row * (self.experts // self.per_lane) + self.lane
            words = lanes.gather(ref, at, self.per_lane, where=self._exists[0] & exists)
        else:
            at = row * self.experts + self.first
            words = [lanes.gather(ref, at + j, where=here & exists)[0] for j, here in enumerate(self._exists)]
        return [_as_f32(word) for word in words]

    def scores(self, logits: list[jax.Array]) -> _Scores:
        """The scores of this lane's experts. An expert that does not exist adds nothing to the sum of the softmax."""
        absent = np.float32(-np.inf)
        logits = [jnp.where(here, x, absent) for here, x in zip(self._exists, logits, strict=True)]
        return _Scores(logits, self.config.scoring == "softmax")

    def choice_order(self, scores: list[jax.Array], biases: list[jax.Array] | None) -> list[jax.Array]:
        """i32 per expert: larger for an expert that is chosen earlier, equal for equal ones, _TAKEN if it is none."""
        if biases is None:  # scores are not negative, so their bits are in order
            choice, order = scores, [lax.bitcast_convert_type(s, jnp.int32) for s in scores]
        else:
            choice = [lane_math.add_rn(s, b) for s, b in zip(scores, biases, strict=True)]
            order = [_order(c) for c in choice]
        if self.config.has_groups:
            # In XLA masked experts have the value -inf too, so they may still win against a bias of -inf.
            masked = _order(lanes.splat(-np.inf, jnp.float32))
            kept = self._in_best_groups(choice)
            order = [jnp.where(kept, o, masked) for o in order]
        return [jnp.where(here, o, _TAKEN) for here, o in zip(self._exists, order, strict=True)]

    def _in_best_groups(self, choice):
        """Whether this lane's experts belong to one of the best groups. Each group has a power of two of lanes."""
        size = self.experts // self.config.num_groups
        group_lanes = size // self.per_lane
        best, second = choice[0], lanes.splat(-np.inf, jnp.float32)
        for value in choice[1:]:
            best, second = jnp.maximum(best, value), jnp.maximum(second, jnp.minimum(best, value))
        step = 1
        while step < group_lanes:
            other, other_second = lanes.partner(best, step), lanes.partner(second, step)
            second = jnp.maximum(jnp.minimum(best, other), jnp.maximum(second, other_second))
            best = jnp.maximum(best, other)
            step *= 2
        score = lane_math.add_rn(best, second) if min(SCORES_PER_GROUP, size) > 1 else best
        group = self.lane >> (group_lanes.bit_length() - 1)
        order = jnp.where(group < self.config.num_groups, _order(score), _TAKEN)

        def choose(_, state):
            order, kept = state
            chosen = _first_of_largest(order, group)
            return jnp.where(group != chosen, order, _TAKEN), jnp.where(group != chosen, kept, 1)

        _, kept = lax.fori_loop(0, self.config.topk_groups, choose, (order, lanes.splat(0, jnp.int32)))
        return kept > 0

    def choose(self, order: list[jax.Array]) -> jax.Array:
        """The expert of rank r in lane r."""
        experts = [self.first + j for j in range(self.per_lane)]

        def better(a, b):  # the experts of a have lower indices
            return jnp.maximum(a[0], b[0]), jnp.where(b[0] > a[0], b[1], a[1])

        def choose_one(r, state):
            order, ids = state
            chosen = _first_of_largest(*_tree(better, list(zip(order, experts, strict=True))))
            order = tuple(jnp.where(e != chosen, o, _TAKEN) for e, o in zip(experts, order, strict=True))
            return order, jnp.where(self.lane == r, chosen, ids)

        return lax.fori_loop(0, self.config.top_k, choose_one, (tuple(order), lanes.splat(0, jnp.int32)))[1]

    def weights(self, scores: jax.Array, spoiled: jax.Array) -> jax.Array:
        """The weight of rank r in lane r, from the score of rank r in lane r."""
        if self.config.renormalize:
            total = lanes.sum_of_neighbours(jnp.where(self.lane < self.config.top_k, scores, np.float32(0)), WARP)
            scores = lane_math.div_rn(scores, jnp.maximum(total, np.float32(MIN_WEIGHT_SUM)))
        weights = lane_math.mul_rn(scores, np.float32(self.config.routed_scaling_factor))
        return jnp.where(spoiled, np.float32(np.nan), weights)


def _first_of_largest(order, index):
    """In all lanes of a warp: the lowest `index` >= 0 among the lanes whose `order` is largest."""
    largest = lanes.largest_of_neighbours(order, WARP)
    return -lanes.largest_of_neighbours(jnp.where(order == largest, -index, _TAKEN), WARP)


def _order(x):
    """i32 that orders f32 as numbers; NaN is the largest. There is no -0: scores are not negative, sums are not -0."""
    return _flip_negative(lax.bitcast_convert_type(x, jnp.int32))


def _flip_negative(bits):
    """The lower 31 bits inverted where the sign is set. It is its own inverse."""
    return bits ^ ((bits >> 31) & np.int32(0x7FFFFFFF))


def _largest_f32(x):
    """Maximum over a warp, in all its lanes."""
    largest = lanes.largest_of_neighbours(_flip_negative(lax.bitcast_convert_type(x, jnp.int32)), WARP)
    return lax.bitcast_convert_type(_flip_negative(largest), jnp.float32)


def _sigmoid(x):
    return lane_math.reciprocal_approx_subnormal(lane_math.add_rn(np.float32(1), _exp(-x)))


def _exp(x):
    """e^x within 4 ulp, the rounding error of x * log2(e) included; subnormal results are not flushed."""
    x = jnp.minimum(jnp.maximum(x, np.float32(-150)), np.float32(150))  # both give 0 or inf, and NaN stays
    power = lane_math.mul_rn(x, _LOG2E)
    rest = lane_math.fma_rn(x, _LOG2E_REST, lane_math.fma_rn(x, _LOG2E, -power))
    return lane_math.mul_rn(lane_math.exp2_approx_subnormal(power), lane_math.fma_rn(rest, _LN2, np.float32(1)))


def _tree(combine, items):
    """Combines neighbours until one item is left, in a tree: fewer operations wait for each other than in a chain."""
    while len(items) > 1:
        pairs = [combine(a, b) for a, b in zip(items[::2], items[1::2], strict=False)]
        items = pairs + items[len(items) & ~1 :]
    return items[0]


def _as_f32(word):
    return lax.bitcast_convert_type(word, jnp.float32)

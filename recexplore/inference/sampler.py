"""Constrained sampling: n sequences of a trie for every prompt, drawn independently or distinct.

Both samplers walk down the trie level by level. The nodes at which some continuation still has a
choice are the *frontier*: each stands there once, however many continuations share it, so that a
level costs min(n, nodes that branch there) tokens. Its tokens join a tree segment, in which a node
looks at its ancestors only; nothing is ever reordered. A continuation below whose node one allowed
sequence is left costs no more: the levels end with the trie's branching depth.

Drawing distinct sequences is stochastic beam search (Kool, van Hoof & Welling, ICML 2019): with φ
the tempered log-probability of a node and G ~ Gumbel(φ) its perturbed one, children get Gumbels
whose maximum is their parent's G, and the n nodes with the highest G are kept. The n sequences that
remain are a sample without replacement, in order.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from recexplore.inference.context import Context
from recexplore.models.attention import Segment
from recexplore.models.networks import LanguageModel
from recexplore.models.trie import (
    ROOT,
    Level,
    Trie,
    children_of,
    each_once,
    first_allowed_below,
    num_allowed_below,
)

_IMPOSSIBLE = -1e30
_NOWHERE = jnp.iinfo(jnp.int32).max


class Draws(NamedTuple):
    """n draws for each of B prompts; distinct ones come in the order of the sample.

    Attributes:
      clusters: which sequence of the trie was drawn; -1 where distinct ones ran out.
      log_probabilities: of the sequence at temperature 1, among the allowed ones; -inf beside -1.
      tempered: of the sequence at the temperature of sampling, likewise.
      perturbed: distinct draws' perturbed log-probabilities G, in descending order; those of
        independent draws are their tempered ones.
      thresholds: the highest perturbed log-probability κ of what was not drawn; -inf where nothing
        was left, and for independent draws. A sequence is in the sample if its G exceeds κ.
    """

    clusters: Int[Array, "B N"]
    log_probabilities: Float[Array, "B N"]
    tempered: Float[Array, "B N"]
    perturbed: Float[Array, "B N"]
    thresholds: Float[Array, "B"]


class _Paths(NamedTuple):
    """n continuations on their way down.

    Attributes:
      nodes: where they stand; any node where `perturbed` is -inf.
      log_probabilities: see Draws.
      tempered: see Draws.
      perturbed: see Draws; 0 for all independent draws.
      thresholds: see Draws.
    """

    nodes: Int[Array, "B N"]
    log_probabilities: Float[Array, "B N"]
    tempered: Float[Array, "B N"]
    perturbed: Float[Array, "B N"]
    thresholds: Float[Array, "B"]


class _Frontier(NamedTuple):
    """The nodes at which there is a choice, as the model has read them.

    Attributes:
      nodes: ascending; _NOWHERE after the last.
      hidden: the model's hidden state at each.
      tree: keys and values of all frontiers so far; None at the root.
      ancestors: which of their tokens lead to each node.
    """

    nodes: Int[Array, "B F"]
    hidden: Float[Array, "B F D"]
    tree: Segment | None
    ancestors: Bool[Array, "B F Q"]


class _Choices(NamedTuple):
    """What can follow the nodes of a frontier.

    Attributes:
      children: node ids.
      possible: which of them lead to an allowed sequence.
      gains: log-probability of each at temperature 1.
      tempered: at the temperature of sampling.
    """

    children: Int[Array, "B F C"]
    possible: Bool[Array, "B F C"]
    gains: Float[Array, "B F C"]
    tempered: Float[Array, "B F C"]


def sample(
    model: LanguageModel,
    params: dict,
    trie: Trie,
    context: Context,
    excluded: Int[Array, "B X"],
    keys: Key[Array, "B"],
    num_samples: int,
    temperature: float,
    distinct: bool,
) -> Draws:
    """Draws n sequences of the trie for every prompt.

    At every node the next token is drawn among the children below which an allowed sequence is
    left, with the model's probabilities renormalised over them; an excluded sequence has
    probability zero.

    Args:
      model: the novelty model.
      params: its variables.
      trie: all sequences.
      context: B prompts as the model has read them.
      excluded: ranks that may not be drawn, of `trie.exclude`; at least one sequence must remain.
      keys: a random key for each prompt; its draws depend on nothing else of the batch.
      num_samples: n.
      temperature: the logits are divided by it before drawing.
      distinct: without replacement; when n reaches the number of allowed sequences, all are drawn.
    """
    shape = (len(context.lengths), num_samples)
    paths = _start(keys, shape, distinct)
    frontier = _Frontier(
        nodes=jnp.full((shape[0], 1), ROOT, jnp.int32),
        hidden=context.last[:, None],
        tree=None,
        ancestors=jnp.zeros((shape[0], 1, 0), bool),
    )
    for depth, level in enumerate(trie.levels):
        if depth:
            frontier = _read(model, params, trie, level, context, excluded, paths, frontier, depth)
        choices = _choices(model, params, trie, level, excluded, frontier, temperature)
        level_keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, depth)
        advance = _advance_distinct if distinct else _advance_independent
        paths = advance(trie, excluded, level_keys, paths, frontier, choices)
    drawn = jnp.isfinite(paths.perturbed)
    clusters = first_allowed_below(trie, excluded, paths.nodes)
    return Draws(
        clusters=jnp.where(drawn, clusters, -1),
        log_probabilities=jnp.where(drawn, paths.log_probabilities, -jnp.inf),
        tempered=jnp.where(drawn, paths.tempered, -jnp.inf),
        perturbed=paths.perturbed if distinct else paths.tempered,
        thresholds=paths.thresholds,
    )


def log_inclusion(draws: Draws) -> Float[Array, "B N"]:
    """Log-probability that a distinct draw's perturbed log-probability exceeds the threshold,

        q(κ) = P(G > κ) = 1 − exp(−exp(φ − κ)).

    exp(φ) / q(κ) is the weight of a draw in an unbiased estimate of a mean over all allowed
    sequences (Kool et al. 2019, equation 13). It is 0 beside -1, where exp(φ) is 0 too. Independent
    draws have no threshold: their weights in a mean are 1/n each.
    """
    tempered = jnp.where(draws.clusters < 0, jnp.inf, draws.tempered)
    return _log1mexp(-jnp.exp(tempered - jnp.asarray(draws.thresholds)[:, None]))


def _start(keys: Key[Array, "B"], shape: tuple[int, int], distinct: bool) -> _Paths:
    """All at the root; of distinct ones the first alone, with a perturbation of its own."""
    perturbed = jnp.zeros(shape, jnp.float32)
    if distinct:
        root_keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, _NOWHERE)
        perturbed = jnp.full(shape, -jnp.inf).at[:, 0].set(_gumbels(root_keys, ()))
    zeros = jnp.zeros(shape, jnp.float32)
    nothing = jnp.full(shape[:1], -jnp.inf)
    return _Paths(jnp.full(shape, ROOT, jnp.int32), zeros, zeros, perturbed, nothing)


def _has_choice(trie: Trie, excluded: Int[Array, "B X"], paths: _Paths) -> Bool[Array, "B N"]:
    return jnp.isfinite(paths.perturbed) & (num_allowed_below(trie, excluded, paths.nodes) > 1)


def _read(
    model: LanguageModel,
    params: dict,
    trie: Trie,
    level: Level,
    context: Context,
    excluded: Int[Array, "B X"],
    paths: _Paths,
    above: _Frontier,
    depth: int,
) -> _Frontier:
    """The frontier one level down, run through the model."""
    choosing = _has_choice(trie, excluded, paths)
    nodes = _distinct_nodes(jnp.where(choosing, paths.nodes, _NOWHERE), level)
    known = jnp.where(nodes == _NOWHERE, ROOT, nodes)
    parents = _find(above.nodes, jnp.take(trie.parents, known))
    inherited = jnp.take_along_axis(above.ancestors, parents[..., None], axis=1)
    itself = jnp.eye(nodes.shape[1], dtype=bool)[None]
    context_masks = context.masks_for(1)
    segments = context.segments
    if above.tree is not None:
        segments, context_masks = (*segments, above.tree), (*context_masks, inherited)

    def run():
        return model.apply(
            params,
            jnp.take(trie.tokens, known),
            jnp.broadcast_to((context.lengths + depth - 1)[:, None], known.shape),
            itself,
            segments,
            context_masks,
            method="extend",
        )

    idle = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(run))
    hidden, own = jax.lax.cond(jnp.any(choosing), run, lambda: idle)
    every = jnp.broadcast_to(itself, (len(known), *itself.shape[1:]))
    return _Frontier(
        nodes, hidden, _join(above.tree, own), jnp.concatenate([inherited, every], axis=-1)
    )


def _choices(
    model: LanguageModel,
    params: dict,
    trie: Trie,
    level: Level,
    excluded: Int[Array, "B X"],
    frontier: _Frontier,
    temperature: float,
) -> _Choices:
    nodes = jnp.where(frontier.nodes == _NOWHERE, ROOT, frontier.nodes)
    children, real = children_of(trie, level, nodes)
    possible = real & (num_allowed_below(trie, excluded, children) > 0)
    logits = model.apply(params, frontier.hidden, level.alphabet, method="token_logits")
    symbols = jnp.minimum(jnp.take(trie.symbols, children), level.alphabet.shape[0] - 1)
    logits = jnp.take_along_axis(logits, symbols, axis=-1)
    gains = jax.nn.log_softmax(jnp.where(possible, logits, _IMPOSSIBLE))
    tempered = gains
    if temperature != 1.0:
        tempered = jax.nn.log_softmax(jnp.where(possible, logits / temperature, _IMPOSSIBLE))
    return _Choices(children, possible, gains, tempered)


def _advance_independent(trie, excluded, keys, paths: _Paths, frontier, choices) -> _Paths:
    """Each continuation draws a child of its node, by inversion of the distribution function."""
    choosing = _has_choice(trie, excluded, paths)
    place = _find(frontier.nodes, paths.nodes)
    shape = (2, paths.nodes.shape[1])
    uniform = jax.vmap(lambda key: jax.random.uniform(key, shape))(keys)
    slot = _draw_child(choices, place, uniform[:, 0], uniform[:, 1])

    def moved(values, new):
        return jnp.where(choosing, _at(new, place, slot), values)

    return paths._replace(
        nodes=moved(paths.nodes, choices.children),
        log_probabilities=paths.log_probabilities + moved(0.0, choices.gains),
        tempered=paths.tempered + moved(0.0, choices.tempered),
    )


def _draw_child(
    choices: _Choices,
    place: Int[Array, "B N"],
    for_block: Float[Array, "B N"],
    for_slot: Float[Array, "B N"],
) -> Int[Array, "B N"]:
    """Which child each continuation draws: first one of some √C blocks of children, then one of it.

    A uniform number has 23 bits, too few to tell a million children apart; two have enough.
    """
    mass = jnp.where(choices.possible, jnp.exp(choices.tempered), 0.0)
    batch, frontier, count = mass.shape
    width = math.isqrt(count - 1) + 1
    num_blocks = -(-count // width)
    mass = jnp.pad(mass, ((0, 0), (0, 0), (0, num_blocks * width - count)))
    blocks = mass.reshape(batch, frontier * num_blocks, width)
    of_blocks = blocks.sum(axis=-1).reshape(batch, frontier, num_blocks)
    block = _invert(of_blocks, place, for_block)
    return block * width + _invert(blocks, place * num_blocks + block, for_slot)


def _invert(
    mass: Float[Array, "B F C"], place: Int[Array, "B N"], uniform: Float[Array, "B N"]
) -> Int[Array, "B N"]:
    """The first slot with any mass at which the running sum of a row's masses exceeds a uniform
    number's share of their total."""
    count = mass.shape[-1]
    sums = jax.lax.cummax(jnp.cumsum(mass, axis=-1), axis=2)
    slots = jnp.arange(count)[None, None]
    # Rounding may let the sum grow, or end, where there is no mass.
    next_possible = jax.lax.cummin(jnp.where(mass > 0, slots, count), axis=2, reverse=True)
    last_possible = jnp.max(jnp.where(mass > 0, slots, 0), axis=-1)
    target = uniform * _at(sums, place, jnp.full_like(place, count - 1))
    slot = jnp.minimum(_first_above(sums, place, target), count - 1)
    slot = _at(next_possible, place, slot)
    return jnp.minimum(slot, jnp.take_along_axis(last_possible, place, axis=1))


def _at(values: Array, place: Int[Array, "B N"], slot: Int[Array, "B N"]) -> Array:
    """values[b, place, slot] of [B, F, C] for each continuation."""
    flat = values.reshape(values.shape[0], -1)
    return jnp.take_along_axis(flat, place * values.shape[-1] + slot, axis=1)


def _first_above(
    sums: Float[Array, "B F C"], place: Int[Array, "B N"], target: Float[Array, "B N"]
) -> Int[Array, "B N"]:
    """The first slot whose running sum exceeds the target, found by halves; C where none does."""
    low, high = jnp.zeros_like(place), jnp.full_like(place, sums.shape[-1])
    for _ in range(sums.shape[-1].bit_length()):
        middle = (low + high) // 2
        below = _at(sums, place, jnp.minimum(middle, sums.shape[-1] - 1)) <= target
        below = below & (middle < high)
        low, high = jnp.where(below, middle + 1, low), jnp.where(below, high, middle)
    return low


def _advance_distinct(trie, excluded, keys, paths: _Paths, frontier, choices) -> _Paths:
    """The n nodes of highest perturbed log-probability among all children and ended paths."""
    batch, num_samples = paths.nodes.shape
    choosing = _has_choice(trie, excluded, paths)
    # Each node of the frontier belongs to one continuation; both stand in the order of the nodes.
    owner = jnp.argsort(jnp.where(choosing, paths.nodes, _NOWHERE), axis=1)
    owner = owner[:, : frontier.nodes.shape[1]]
    filled = jnp.take_along_axis(choosing, owner, axis=1)

    def of_owner(values):
        return jnp.take_along_axis(values, owner, axis=1)[..., None]

    tempered = of_owner(paths.tempered) + choices.tempered
    shape = choices.children.shape[1:]
    noise = _gumbels(keys, shape)
    possible = choices.possible & filled[..., None]
    perturbed = _conditional_gumbels(tempered + noise, of_owner(paths.perturbed), possible)
    stay = jnp.where(choosing, -jnp.inf, paths.perturbed)

    def all_(children, staying):
        return jnp.concatenate([children.reshape(batch, -1), staying], axis=1)

    ranked, order = jax.lax.top_k(all_(perturbed, stay), num_samples + 1)

    def kept(children, staying):
        return jnp.take_along_axis(all_(children, staying), order[:, :num_samples], axis=1)

    log_probabilities = of_owner(paths.log_probabilities) + choices.gains
    return _Paths(
        nodes=kept(choices.children, paths.nodes),
        log_probabilities=kept(log_probabilities, paths.log_probabilities),
        tempered=kept(tempered, paths.tempered),
        perturbed=ranked[:, :num_samples],
        # What is pruned at any level carries the highest G of all the sequences below it.
        thresholds=jnp.maximum(paths.thresholds, ranked[:, num_samples]),
    )


def _conditional_gumbels(
    unconditional: Float[Array, "B F C"],
    wanted: Float[Array, "B F 1"],
    possible: Bool[Array, "B F C"],
) -> Float[Array, "B F C"]:
    """Gumbels shifted so that the highest of each node's children is what is wanted of it, without
    changing their distribution otherwise (Kool et al. 2019, appendix B.3); impossible ones -inf."""
    unconditional = jnp.where(possible, unconditional, -jnp.inf)
    highest = jnp.max(unconditional, axis=-1, keepdims=True)
    gap = jnp.where(possible, unconditional - highest, -1.0)
    shifted = wanted - unconditional + _log1mexp(gap)
    found = wanted - jnp.maximum(shifted, 0.0) - jnp.log1p(jnp.exp(-jnp.abs(shifted)))
    found = jnp.where(gap == 0.0, wanted, found)
    return jnp.where(possible, found, -jnp.inf)


def _log1mexp(x: Float[Array, "*any"]) -> Float[Array, "*any"]:
    """log(1 − exp(x)) for x ≤ 0, without cancellation (Mächler 2012)."""
    near = jnp.log(-jnp.expm1(jnp.minimum(x, -1e-30)))
    return jnp.where(x > -0.6931472, near, jnp.log1p(-jnp.exp(x)))


def _gumbels(keys: Key[Array, "B"], shape: tuple[int, ...]) -> Float[Array, "B *shape"]:
    return jax.vmap(lambda key: jax.random.gumbel(key, shape, mode="high"))(keys)


def _distinct_nodes(nodes: Int[Array, "B N"], level: Level) -> Int[Array, "B F"]:
    """Each node once, ascending; there are no more than branch at this level."""
    width = min(nodes.shape[1], level.branching.shape[0])
    return each_once(nodes, _NOWHERE)[:, :width]


def _find(ascending: Int[Array, "B F"], nodes: Int[Array, "B N"]) -> Int[Array, "B N"]:
    """The place of each node; of those that aren't there, any."""
    found = jax.vmap(jnp.searchsorted)(ascending, nodes)
    return jnp.minimum(found, ascending.shape[1] - 1)


def _join(tree: Segment | None, own: Segment) -> Segment:
    """The tree segment with one more frontier."""
    if tree is None:
        return own
    return Segment(
        jnp.concatenate([tree.keys, own.keys], axis=2),
        jnp.concatenate([tree.values, own.values], axis=2),
        jnp.concatenate([tree.positions, own.positions], axis=1),
    )

"""Every allowed cluster at once: exact log-probabilities and scores in one pass over the trie.

The trie is run through the models as a tree of tokens behind the prompt: each token attends to the
prompt and to its own ancestors (tree attention), so that what many descriptions share is computed
once. The *trunk* are the nodes that several descriptions share; the *tails*, what each has to
itself, follow in groups of neighbours, which look at those trunk nodes alone that lead to them.
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from recexplore.errors import InputError
from recexplore.inference.context import Context
from recexplore.inference.sampler import Draws
from recexplore.models.attention import Segment
from recexplore.models.networks import LanguageModel
from recexplore.models.reward_model import RewardModel
from recexplore.models.trie import ROOT, Trie, num_allowed_below

_IMPOSSIBLE = -1e30
_GROUP = 64  # tails that are run together
_LARGEST_TRUNK = 8_192


class Trunk(NamedTuple):
    """The nodes with children, but for the root, ancestors before descendants.

    Attributes:
      nodes: node ids.
      depths: tokens from the root.
      ancestors: [i, j]: node j is node i or above it.
      parents: of every node but the root, its parent's place among (root, *nodes).
    """

    nodes: Int[Array, "W"]
    depths: Int[Array, "W"]
    ancestors: Bool[Array, "W W"]
    parents: Int[Array, "others"]


class Tails(NamedTuple):
    """What follows the trunk, in groups of clusters that are neighbours in the trie.

    Attributes:
      clusters: of each group; -1 after the last.
      tokens: of each cluster after the trunk, right-padded.
      lengths: how many.
      starts: how many tokens of the description are in the trunk.
      trunk: places in the trunk that lead to any of the group; 0 after the last.
      above: which of those lead to each cluster.
    """

    clusters: Int[Array, "groups G"]
    tokens: Int[Array, "groups G R"]
    lengths: Int[Array, "groups G"]
    starts: Int[Array, "groups G"]
    trunk: Int[Array, "groups A"]
    above: Bool[Array, "groups G A"]


class Tree(NamedTuple):
    """A trie, laid out to be run through a model."""

    trunk: Trunk
    tails: Tails


def build_tree(trie: Trie) -> Tree:
    """Lays a trie out, in numpy.

    Raises:
      InputError: the trunk is too large for a mask of all pairs of its nodes.
    """
    parents, num_children = np.asarray(trie.parents), np.asarray(trie.num_children)
    nodes = np.flatnonzero(num_children > 0)[1:] if len(parents) > 1 else np.array([], int)
    if len(nodes) > _LARGEST_TRUNK:
        raise InputError(
            f"The {trie.num_sequences:,} descriptions share {len(nodes):,} beginnings; up to "
            f"{_LARGEST_TRUNK:,} can be run through a model at once. Sample with "
            "selection.BestOfN.sampler = 'distinct' instead."
        )
    place = np.full(len(parents), -1)
    place[nodes] = np.arange(len(nodes))
    depths = np.zeros(len(parents), np.int32)
    ancestors = np.eye(len(nodes), dtype=bool)
    for index, node in enumerate(nodes):
        depths[node] = depths[parents[node]] + 1
        if parents[node] != ROOT:
            ancestors[index] |= ancestors[place[parents[node]]]
    trunk = Trunk(
        nodes.astype(np.int32), depths[nodes], ancestors, (place[parents[1:]] + 1).astype(np.int32)
    )
    return Tree(trunk, _build_tails(trie, place))


def _build_tails(trie: Trie, place: np.ndarray) -> Tails:
    groups = -(-trie.num_sequences // _GROUP)
    size = -(-trie.num_sequences // groups)
    clusters = np.full(groups * size, -1, np.int32)
    clusters[: trie.num_sequences] = trie.leaf_order
    known = np.maximum(clusters, 0)
    above = place[np.asarray(trie.paths)[known]]  # -1 where the path has left the trunk
    starts = (above >= 0).sum(axis=1).astype(np.int32)
    lengths = np.asarray(trie.lengths)[known] - starts
    at = starts[:, None] + np.arange(lengths.max())[None, :]
    tokens = np.take_along_axis(
        np.asarray(trie.sequences)[known], np.minimum(at, trie.max_length - 1), axis=1
    )
    tokens = np.where(np.arange(lengths.max()) < lengths[:, None], tokens, 0).astype(np.int32)
    above = above.reshape(groups, size, trie.depth)
    leading = [np.unique(row[row >= 0]) for row in above]
    trunk = np.zeros((groups, max(map(len, leading))), np.int32)
    mask = np.zeros((groups, size, trunk.shape[1]), bool)
    for group, places in enumerate(leading):
        trunk[group, : len(places)] = places
        mask[group, :, : len(places)] = (above[group][:, :, None] == places).any(axis=1)

    def grouped(x):
        return x.reshape(groups, size, *x.shape[1:])

    return Tails(*map(grouped, (clusters, tokens, lengths, starts)), trunk=trunk, above=mask)


def all_clusters(
    model: LanguageModel,
    params: dict,
    trie: Trie,
    tree: Tree,
    context: Context,
    excluded: Int[Array, "B X"],
    temperature: float,
) -> Draws:
    """Every allowed cluster, as if drawn, in the order of the ids; -1 stands for the others.

    Args:
      model: the novelty model.
      params: its variables.
      trie: the descriptions.
      tree: of `build_tree`.
      context: B prompts as the model has read them.
      excluded: ranks that are not allowed, of `trie.exclude`.
      temperature: of `Draws.tempered`.
    """
    logits = node_logits(model, params, trie, tree, context)
    log_probabilities = among_allowed(trie, logits, excluded)
    tempered = log_probabilities
    if temperature != 1.0:
        tempered = among_allowed(trie, logits / temperature, excluded)
    clusters = jnp.arange(trie.num_sequences)[None]
    return Draws(
        clusters=jnp.where(jnp.isfinite(log_probabilities), clusters, -1),
        log_probabilities=log_probabilities,
        tempered=tempered,
        perturbed=tempered,
        thresholds=jnp.full(len(excluded), -jnp.inf),
    )


def node_logits(
    model: LanguageModel, params: dict, trie: Trie, tree: Tree, context: Context
) -> Float[Array, "B others"]:
    """The logit of every node's token, but the root's, after its parent.

    Args:
      model: the novelty model.
      params: its variables.
      trie: the descriptions.
      tree: of `build_tree`.
      context: B prompts as the model has read them.
    """
    hidden, _ = _read_trunk(model, params, trie, tree.trunk, context)
    at_parents = jnp.take(hidden, tree.trunk.parents, axis=1)
    return model.apply(params, at_parents, trie.tokens[1:], method="paired_logits")


def among_allowed(
    trie: Trie, logits: Float[Array, "B others"], excluded: Int[Array, "B X"]
) -> Float[Array, "B M"]:
    """Exact log-probabilities of whole sequences, renormalised at every node over its children that
    lead to an allowed one; -inf for those that are not. Their exponentials sum to 1 in each row.

    Args:
      trie: all sequences.
      logits: of `node_logits`.
      excluded: ranks that are not allowed, of `trie.exclude`.
    """
    nodes = jnp.broadcast_to(1 + jnp.arange(logits.shape[1])[None], logits.shape)
    possible = num_allowed_below(trie, excluded, nodes) > 0
    gains = _log_softmax_among_siblings(jnp.where(possible, logits, _IMPOSSIBLE), trie)
    gains = jnp.pad(gains, ((0, 0), (1, 0)))  # at the root
    steps = jnp.take(gains, trie.paths.reshape(-1), axis=1).reshape(len(gains), *trie.paths.shape)
    # Paths are padded with their last node, which counts once.
    above = jnp.pad(trie.paths[:, :-1], ((0, 0), (1, 0)), constant_values=ROOT)
    total = jnp.sum(jnp.where((trie.paths != above)[None], steps, 0.0), axis=-1)
    ends = trie.paths[:, -1] if trie.depth else jnp.zeros_like(trie.lengths)
    ends = jnp.broadcast_to(ends[None], total.shape)
    return jnp.where(num_allowed_below(trie, excluded, ends) > 0, total, -jnp.inf)


def all_scores(
    model: RewardModel, params: dict, trie: Trie, tree: Tree, context: Context
) -> Float[Array, "B M"]:
    """The alignment score of every cluster after each prompt.

    Args:
      model: the alignment model.
      params: its variables.
      trie: the descriptions.
      tree: of `build_tree`.
      context: B prompts as the model has read them.
    """
    _, trunk = _read_trunk(model, params, trie, tree.trunk, context)
    num_prompts, num_steps = len(context.lengths), tree.tails.tokens.shape[2]
    steps = jnp.arange(num_steps)
    causal = (steps[:, None] >= steps[None, :])[None, None]

    def score(tails: Tails) -> Float[Array, "B G"]:
        shape = (num_prompts, *tails.tokens.shape)
        positions = context.lengths[:, None, None] + tails.starts[None, :, None]
        segments, masks = context.segments, context.masks_for(2)
        if trunk is not None:
            segments = (*segments, _pick(trunk, tails.trunk))
            masks = (*masks, tails.above[None, :, None, :])
        hidden, _ = model.apply(
            params,
            jnp.broadcast_to(tails.tokens[None], shape),
            jnp.broadcast_to(positions + steps[None, None, :], shape),
            causal,
            segments,
            masks,
            read_at=jnp.broadcast_to((tails.lengths - 1)[None, :, None], (*shape[:2], 1)),
            method="extend",
        )
        return model.apply(params, hidden[..., 0, :], method="score")

    by_rank = jnp.moveaxis(jax.lax.map(score, tree.tails), 0, 1).reshape(num_prompts, -1)
    return jnp.take(by_rank, trie.leaf_rank, axis=1)


def _read_trunk(
    model: nn.Module, params: dict, trie: Trie, trunk: Trunk, context: Context
) -> tuple[Float[Array, "B places D"], Segment | None]:
    """Hidden states at the root and at the trunk's nodes, and their keys and values."""
    root = context.last[:, None]
    if not trunk.nodes.shape[0]:
        return root, None
    shape = (len(context.lengths), trunk.nodes.shape[0])
    hidden, segment = model.apply(
        params,
        jnp.broadcast_to(jnp.take(trie.tokens, trunk.nodes)[None], shape),
        context.lengths[:, None] + trunk.depths[None, :] - 1,
        trunk.ancestors[None],
        context.segments,
        context.masks_for(1),
        method="extend",
    )
    return jnp.concatenate([root, hidden], axis=1), segment


def _pick(segment: Segment, places: Int[Array, "A"]) -> Segment:
    return Segment(
        jnp.take(segment.keys, places, axis=2),
        jnp.take(segment.values, places, axis=2),
        jnp.take(segment.positions, places, axis=1),
    )


def _log_softmax_among_siblings(
    logits: Float[Array, "B others"], trie: Trie
) -> Float[Array, "B others"]:
    parents, count = trie.parents[1:], len(trie.parents)
    highest = jax.ops.segment_max(logits.T, parents, num_segments=count)
    shifted = logits - jnp.take(highest, parents, axis=0).T
    total = jax.ops.segment_sum(jnp.exp(shifted).T, parents, num_segments=count)
    return shifted - jnp.log(jnp.take(total, parents, axis=0)).T

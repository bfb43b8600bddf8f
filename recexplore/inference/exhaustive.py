"""Every allowed cluster at once: exact log-probabilities and scores in one pass over the trie.

The trie's nodes are laid out as one sequence behind the prompt; each attends to the prompt and to
its own ancestors (tree attention), so that a token that many descriptions share is computed once.
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from recexplore.inference.sampler import Prompts
from recexplore.models.reward_model import RewardModel
from recexplore.models.transformer import Transformer
from recexplore.models.trie import ROOT, Trie, allowed_running_sum, num_allowed_below

_IMPOSSIBLE = -1e30


class Tree(NamedTuple):
    """Which of the trie's nodes to run through a model, and who sees whom among them.

    Attributes:
      nodes: node ids, ancestors before descendants.
      place: a node's index in `nodes`; 0 for those left out.
      ancestors: [i, j]: node j is node i or above it.
    """

    nodes: Int[Array, "Q"]
    place: Int[Array, "E"]
    ancestors: Bool[Array, "Q Q"]


def build_tree(trie: Trie, leaves: bool) -> Tree:
    """All nodes below the root, in numpy; without `leaves` only those that have children."""
    parents, num_children = np.asarray(trie.parents), np.asarray(trie.num_children)
    wanted = (num_children > 0) | leaves
    wanted[ROOT] = False
    nodes = np.flatnonzero(wanted).astype(np.int32)
    place = np.zeros(len(parents), np.int32)
    place[nodes] = np.arange(len(nodes))
    ancestors = np.eye(len(nodes), dtype=bool)
    for index, node in enumerate(nodes):
        if parents[node] != ROOT:
            ancestors[index] |= ancestors[place[parents[node]]]
    return Tree(nodes, place, ancestors)


def log_probabilities(
    model: Transformer,
    params: dict,
    trie: Trie,
    inner: Tree,
    prompts: Prompts,
    excluded: Bool[Array, "B X M"],
) -> Float[Array, "B X M"]:
    """Exact log-probability of every cluster under constrained decoding.

    Args:
      model: the novelty model.
      params: its variables.
      trie: the descriptions.
      inner: `build_tree(trie, leaves=False)`.
      prompts: B prompts.
      excluded: X sets of clusters for each prompt; those of a set have probability zero and the
        rest is renormalised at every node. The model runs once for all X.

    Returns:
      The log-probabilities; -inf for excluded clusters. Their exponentials sum to 1 in each row.
    """
    at_nodes, last = _tree_hidden(model, params, trie, inner, prompts)
    everywhere = jnp.take(at_nodes, inner.place, axis=1)
    at_root = (jnp.arange(len(trie.tokens)) == ROOT)[None, :, None]
    everywhere = jnp.where(at_root, last, everywhere)
    at_parents = jnp.take(everywhere, trie.parents, axis=1)
    tokens = jnp.broadcast_to(trie.tokens[None, :, None], (*at_parents.shape[:2], 1))
    logits = model.apply(params, at_parents, tokens, method="token_logits")[..., 0]
    among = jax.vmap(_among_allowed, in_axes=(None, None, 1), out_axes=1)
    return among(trie, logits, excluded)


def _among_allowed(
    trie: Trie, logits: Float[Array, "B E"], excluded: Bool[Array, "B M"]
) -> Float[Array, "B M"]:
    """Log-probabilities of whole paths, each node's renormalised over its possible siblings."""
    all_nodes = jnp.broadcast_to(jnp.arange(len(trie.tokens))[None], logits.shape)
    counts = num_allowed_below(trie, allowed_running_sum(trie, excluded), all_nodes)
    possible = (counts > 0) & (all_nodes != ROOT)
    gains = _log_softmax_among_siblings(jnp.where(possible, logits, _IMPOSSIBLE), trie.parents)
    steps = jnp.take(gains, trie.paths.reshape(-1), axis=1).reshape(-1, *trie.paths.shape)
    real = jnp.arange(trie.max_length)[None, :] < trie.lengths[:, None]
    total = jnp.sum(jnp.where(real[None], steps, 0.0), axis=-1)
    return jnp.where(excluded, -jnp.inf, total)


def scores(
    model: RewardModel, params: dict, trie: Trie, tree: Tree, prompts: Prompts
) -> Float[Array, "B M"]:
    """The alignment score of every cluster after each prompt.

    Args:
      model: the alignment model.
      params: its variables.
      trie: the descriptions.
      tree: `build_tree(trie, leaves=True)`.
      prompts: B prompts.
    """
    at_nodes, _ = _tree_hidden(model, params, trie, tree, prompts)
    leaves = jnp.take(tree.place, trie.paths[:, -1])
    return model.apply(params, jnp.take(at_nodes, leaves, axis=1), method="score")


def _tree_hidden(
    model: nn.Module, params: dict, trie: Trie, tree: Tree, prompts: Prompts
) -> tuple[Float[Array, "B Q D"], Float[Array, "B 1 D"]]:
    """Hidden states at the tree's nodes, and at the prompts' ends."""
    hidden, prompt = model.apply(params, prompts.tokens, method="prefill")
    last = jnp.take_along_axis(hidden, (prompts.lengths - 1)[:, None, None], axis=1)
    shape = (prompts.tokens.shape[0], tree.nodes.shape[0])
    tokens = jnp.broadcast_to(jnp.take(trie.tokens, tree.nodes)[None], shape)
    depths = jnp.take(trie.depths, tree.nodes)
    positions = prompts.lengths[:, None] + depths[None, :] - 1
    in_prompt = jnp.arange(prompts.tokens.shape[1])[None, :] < prompts.lengths[:, None]
    at_nodes, _ = model.apply(
        params,
        tokens,
        positions,
        tree.ancestors[None],
        (prompt,),
        (in_prompt[:, None, :],),
        method="extend",
    )
    return at_nodes, last


def _log_softmax_among_siblings(
    logits: Float[Array, "B E"], parents: Int[Array, "E"]
) -> Float[Array, "B E"]:
    count = logits.shape[1]
    highest = jax.ops.segment_max(logits.T, parents, num_segments=count)
    shifted = logits - jnp.take(highest, parents, axis=0).T
    total = jax.ops.segment_sum(jnp.exp(shifted).T, parents, num_segments=count)
    return shifted - jnp.log(jnp.take(total, parents, axis=0)).T

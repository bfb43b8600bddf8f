"""Constrained sampling: n draws for every prompt, each one of the allowed sequences."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from recexplore.models.attention import Segment
from recexplore.models.transformer import Transformer
from recexplore.models.trie import (
    ROOT,
    Trie,
    allowed_running_sum,
    children_of,
    num_allowed_below,
)

_IMPOSSIBLE = -1e30


class Prompts(NamedTuple):
    """Right-padded prompts and the number of real tokens of each."""

    tokens: Int[Array, "B S"]
    lengths: Int[Array, "B"]


class Draws(NamedTuple):
    """n draws for each of B prompts.

    Attributes:
      clusters: which sequence of the trie was drawn.
      log_probabilities: of the draw at temperature 1, among the allowed sequences.
    """

    clusters: Int[Array, "B N"]
    log_probabilities: Float[Array, "B N"]


class _Loop(NamedTuple):
    """What is carried from token to token.

    Attributes:
      nodes: where in the trie each continuation stands.
      hidden: hidden state at the last token of each continuation.
      own: keys and values of the continuations' tokens so far, in a buffer of the longest
        sequence's size: [L, B, N, depth, G, head_dim].
      log_probabilities: of the path so far.
    """

    nodes: Int[Array, "B N"]
    hidden: Float[Array, "B N D"]
    own: Segment
    log_probabilities: Float[Array, "B N"]


def sample(
    model: Transformer,
    params: dict,
    trie: Trie,
    prompts: Prompts,
    excluded: Bool[Array, "B M"],
    keys: Key[Array, "B"],
    num_samples: int,
    temperature: float,
) -> Draws:
    """Draws n sequences of the trie for every prompt, independently.

    At every node the next token is drawn among the children below which an allowed sequence is
    left, with the model's probabilities renormalised over them; an excluded sequence has
    probability zero. The prompt is run through the model once, whatever n.

    Args:
      model: the novelty model.
      params: its variables.
      trie: all sequences.
      prompts: B prompts.
      excluded: sequences that may not be drawn, for each prompt; at least one must remain.
      keys: a random key for each prompt; the draws depend on nothing else of the batch.
      num_samples: n.
      temperature: the logits are divided by it before drawing.
    """
    running_sum = allowed_running_sum(trie, excluded)
    hidden, prompt = model.apply(params, prompts.tokens, method="prefill")
    last = jnp.take_along_axis(hidden, (prompts.lengths - 1)[:, None, None], axis=1)
    num_prompts, depth = prompts.tokens.shape[0], trie.max_length
    shape = (num_prompts, num_samples)
    num_layers, _, _, *heads = prompt.keys.shape
    buffer = jnp.zeros((num_layers, *shape, depth, *heads), prompt.keys.dtype)
    in_prompt = jnp.arange(prompts.tokens.shape[1])[None, :] < prompts.lengths[:, None]

    def choose(step: Array, loop: _Loop) -> _Loop:
        children, real = children_of(trie, loop.nodes)
        possible = real & (num_allowed_below(trie, running_sum, children) > 0)
        tokens = jnp.take(trie.tokens, children)
        logits = model.apply(params, loop.hidden, tokens, method="token_logits")
        logits = jnp.where(possible, logits, _IMPOSSIBLE)
        step_keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, step)
        draw = jax.vmap(lambda key, x: jax.random.categorical(key, x, axis=-1))
        slot = draw(step_keys, logits / temperature)[..., None]
        chosen = jnp.take_along_axis(children, slot, axis=-1)[..., 0]
        gain = jnp.take_along_axis(jax.nn.log_softmax(logits), slot, axis=-1)[..., 0]
        done = jnp.take(trie.num_children, loop.nodes) == 0
        return loop._replace(
            nodes=jnp.where(done, loop.nodes, chosen),
            log_probabilities=loop.log_probabilities + jnp.where(done, 0.0, gain),
        )

    def read(step: Array, loop: _Loop) -> _Loop:
        """Runs the tokens just chosen through the model; they are the step-th of their paths."""
        tokens = jnp.take(trie.tokens, loop.nodes)[..., None]
        positions = jnp.broadcast_to((prompts.lengths + step)[:, None, None], (*shape, 1))
        before = (jnp.arange(depth) < step)[None, None, None, :]
        hidden, new = model.apply(
            params,
            tokens,
            positions,
            jnp.ones((1, 1, 1, 1), bool),
            (prompt, loop.own),
            (in_prompt[:, None, None, :], before),
            method="extend",
        )
        own = jax.tree.map(
            lambda all_, one: jax.lax.dynamic_update_slice_in_dim(all_, one, step, axis=3),
            loop.own,
            new,
        )
        return loop._replace(hidden=hidden[..., 0, :], own=own)

    start = _Loop(
        nodes=jnp.full(shape, ROOT, jnp.int32),
        hidden=jnp.broadcast_to(last, (*shape, last.shape[-1])),
        own=Segment(buffer, buffer),
        log_probabilities=jnp.zeros(shape, jnp.float32),
    )
    loop = choose(jnp.int32(0), start)
    loop = jax.lax.fori_loop(
        0, depth - 1, lambda step, loop: choose(step + 1, read(step, loop)), loop
    )
    return Draws(jnp.take(trie.sequence, loop.nodes), loop.log_probabilities)

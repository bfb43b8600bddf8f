"""Cross-entropy of cluster descriptions among the tokens that were possible.

At each node of the trie that a description comes by, its next token is one of the node's children.
Those that lead only to clusters which the user had seen can't follow. How a node's children are
weighed against each other needs no array as wide as the vocabulary: theirs are gathered.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from recexplore.models.trie import ROOT, Trie, children_of

_IMPOSSIBLE = -1e30


class Choice(NamedTuple):
    """The children among which descriptions go on at one level of the trie.

    Where only one description is left, its next token is certain and nothing is possible here.

    Attributes:
      tokens: that lead to the children.
      symbols: their places in the level's alphabet.
      possible: there is such a child, and it leads to the target or to a cluster not seen.
      banned: there is such a child, and it leads to seen clusters only.
      is_target: the description goes on with it.
      share: of the clusters not seen, the part below the child; sums to 1 where there is a choice.
    """

    tokens: Int[Array, "examples C"]
    symbols: Int[Array, "examples C"]
    possible: Bool[Array, "examples C"]
    banned: Bool[Array, "examples C"]
    is_target: Bool[Array, "examples C"]
    share: Float[Array, "examples C"]

    def wanted(self, smoothing: float) -> Float[Array, "examples C"]:
        """The distribution to learn: the target's, part of it dealt out over the clusters."""
        return (1 - smoothing) * self.is_target + smoothing * self.share

    def exists(self) -> Bool[Array, "examples"]:
        """Whether the description isn't certain yet."""
        return jnp.any(self.possible, axis=1)


def choices_along(
    trie: Trie, seen: Bool[Array, "examples M"], targets: Int[Array, "examples T"]
) -> list[Choice]:
    """What there is to choose from on the way down to each target, level by level.

    Args:
      trie: all descriptions.
      seen: the clusters that can't follow. The target itself can, whatever `seen` says of it.
      targets: the tokens of a description, EOS included; what stands after it means nothing. An
        absent example of a packed row has any tokens: from the first that leads nowhere on there
        is no choice for it.
    """
    allowed = jnp.cumsum(jnp.take(~seen, trie.leaf_order, axis=1), axis=1, dtype=jnp.int32)
    allowed = jnp.pad(allowed, ((0, 0), (1, 0)))  # how many there are before each rank

    def count_below(nodes):
        first, last = jnp.take(trie.first_leaf, nodes), jnp.take(trie.last_leaf, nodes)
        return jnp.take_along_axis(allowed, last, 1) - jnp.take_along_axis(allowed, first, 1)

    nodes = jnp.full((targets.shape[0],), ROOT, jnp.int32)
    on_path = jnp.ones((targets.shape[0],), bool)
    found = []
    for depth, level in enumerate(trie.levels):
        children, real = children_of(trie, level, nodes)
        # Off its path a node is of another level, and so are its children's symbols.
        real &= on_path[:, None]
        children = jnp.where(real, children, ROOT)
        tokens = jnp.take(trie.tokens, children)
        is_target = real & (tokens == targets[:, depth, None])
        counts = jnp.where(real, count_below(children), 0)
        counts = jnp.where(is_target, jnp.maximum(counts, 1), counts)
        share = counts / jnp.maximum(jnp.sum(counts, axis=1, keepdims=True), 1)
        symbols = jnp.take(trie.symbols, children)
        found.append(Choice(tokens, symbols, counts > 0, real & (counts == 0), is_target, share))
        # From a node without children nothing is found, and the description stays there.
        certain = ~jnp.any(real, axis=1)
        below = jnp.max(jnp.where(is_target, children, ROOT), axis=1)
        nodes = jnp.where(certain, nodes, below)
        on_path &= certain | jnp.any(is_target, axis=1)
    return found


class Steps(NamedTuple):
    """What was made of every token of the descriptions.

    Attributes:
      losses: minus the log-probability of the wanted one.
      right: whether the target is the most probable one.
    """

    losses: Float[Array, "examples steps"]
    right: Bool[Array, "examples steps"]


def losses_among_children(
    trie: Trie,
    choices: list[Choice],
    token_logits: Callable[[Array, Array], Array],
    before: Float[Array, "examples depth D"],
    smoothing: float,
) -> Steps:
    """Cross-entropy over the possible children of each node.

    Logits are computed for the tokens of each level alone; once a description is certain there is
    nothing to learn, and no step for it.

    Args:
      trie: all descriptions.
      choices: from `choices_along`.
      token_logits: (hidden states, U tokens) → their logits.
      before: the hidden states before the first tokens of the descriptions.
      smoothing: see `Choice.wanted`.
    """
    losses, right = [], []
    for depth, (level, choice) in enumerate(zip(trie.levels, choices, strict=True)):
        of_level = token_logits(before[:, depth], level.alphabet)
        logits = jnp.take_along_axis(of_level, choice.symbols, axis=1)
        logits = jnp.where(choice.possible, logits, _IMPOSSIBLE)
        log_probabilities = jax.nn.log_softmax(logits)
        terms = jnp.where(choice.possible, choice.wanted(smoothing) * log_probabilities, 0.0)
        best = jnp.argmax(logits, axis=1, keepdims=True)
        losses.append(-jnp.sum(terms, axis=1))
        right.append(jnp.take_along_axis(choice.is_target, best, 1)[:, 0] | ~choice.exists())
    rows = before.shape[0]
    if not losses:  # a single description, which is certain from the start
        return Steps(jnp.zeros((rows, 0)), jnp.ones((rows, 0), bool))
    return Steps(jnp.stack(losses, axis=1), jnp.stack(right, axis=1))


def losses_among_vocabulary(
    choices: list[Choice],
    logits: Float[Array, "examples steps V"],
    targets: Int[Array, "examples steps"],
    smoothing: float,
) -> Steps:
    """Cross-entropy over the vocabulary less the banned children of each node.

    Args:
      choices: from `choices_along`.
      logits: before every token of the descriptions.
      targets: those tokens.
      smoothing: see `Choice.wanted`.
    """
    children = [choice.tokens.shape[1] for choice in choices]
    steps = np.repeat(np.arange(len(choices)), children)  # of all children, level after level
    none = (targets.shape[0], 0)  # where there is a single description, which is certain
    tokens = jnp.concatenate([jnp.zeros(none, jnp.int32), *(c.tokens for c in choices)], axis=1)
    out = jnp.concatenate([jnp.zeros(none, bool), *(c.banned for c in choices)], axis=1)

    # A mask has one byte a logit; nothing else is as large as they but their gradient.
    def mask(where):
        return jnp.zeros(logits.shape[1:], bool).at[steps, where].set(True, mode="drop")

    banned = jax.vmap(mask)(jnp.where(out, tokens, logits.shape[-1]))
    possible = jnp.where(banned, _IMPOSSIBLE, logits)
    normaliser = jax.nn.logsumexp(possible, axis=-1)
    right = jnp.argmax(possible, axis=-1) == targets
    wanted = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    if smoothing and choices:
        of_children = jax.vmap(lambda row, at: row[steps, at])(logits, tokens)
        by_level = jnp.split(of_children, np.cumsum(children)[:-1], axis=1)
        for depth, (choice, found) in enumerate(zip(choices, by_level, strict=True)):
            mean = jnp.sum(choice.wanted(smoothing) * found, axis=1)
            mean = jnp.where(choice.exists(), mean, wanted[:, depth])
            wanted = wanted.at[:, depth].set(mean)
    return Steps(normaliser - wanted, right)

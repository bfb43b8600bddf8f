"""The allowed outputs: token sequences as a trie, flattened to arrays that live on the device.

Built once on the host in numpy; used in compiled code by pure functions of arrays. Nodes are
numbered breadth first, so that the children of a node are one stretch of ids, and outputs are
ordered so that those below a node are one stretch too: which children still lead to an allowed
output is a difference of two entries of a running sum.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from recexplore.errors import InputError

ROOT = 0


class Trie(NamedTuple):
    """M token sequences, each ending in EOS, as E nodes; node 0 is the root.

    Attributes:
      tokens: the token that leads to a node; 0 at the root.
      parents: a node's parent; 0 at the root.
      depths: number of tokens from the root.
      first_child: the children of a node are first_child .. first_child + num_children - 1.
      num_children: 0 at leaves.
      sequence: which sequence ends at a node; -1 at inner nodes.
      first_leaf: sequences below a node are leaf_order[first_leaf : last_leaf].
      last_leaf: see first_leaf.
      leaf_order: sequence ids in the order of the leaves.
      paths: nodes of each sequence from below the root to its leaf, right-padded with the leaf.
      lengths: number of tokens of each sequence, EOS included.
      slots: 0 .. (largest number of children of a node) - 1.
    """

    tokens: Int[Array, "E"]
    parents: Int[Array, "E"]
    depths: Int[Array, "E"]
    first_child: Int[Array, "E"]
    num_children: Int[Array, "E"]
    sequence: Int[Array, "E"]
    first_leaf: Int[Array, "E"]
    last_leaf: Int[Array, "E"]
    leaf_order: Int[Array, "M"]
    paths: Int[Array, "M depth"]
    lengths: Int[Array, "M"]
    slots: Int[Array, "C"]

    @property
    def num_sequences(self) -> int:
        return self.lengths.shape[0]

    @property
    def max_length(self) -> int:
        return self.paths.shape[1]


def build_trie(sequences: Sequence[Sequence[int]], eos_id: int, vocab_size: int) -> Trie:
    """Flattens token sequences to a trie of numpy arrays.

    Args:
      sequences: M different token sequences; each ends in `eos_id` and has it nowhere else, so that
        one may be a prefix of another but for its end.
      eos_id: the end-of-sequence token.
      vocab_size: V; all tokens are in 1 .. V - 1 (0 is padding).

    Returns:
      The trie; sequence i of the input is sequence i of the trie.

    Raises:
      InputError: no sequence, a sequence twice, a missing EOS, or a token outside the vocabulary.
    """
    _check_sequences(sequences, eos_id, vocab_size)
    children: list[dict[int, int]] = [{}]
    ends: dict[int, int] = {}
    for index, sequence in enumerate(sequences):
        node = ROOT
        for token in sequence:
            if token not in children[node]:
                children[node][token] = len(children)
                children.append({})
            node = children[node][token]
        ends[node] = index
    order, tokens, parents = [ROOT], [0], [0]
    for position, node in enumerate(order):  # grows while it is walked: breadth first
        for token in sorted(children[node]):
            order.append(children[node][token])
            tokens.append(token)
            parents.append(position)
    num_children = np.array([len(children[node]) for node in order], np.int32)
    first_child = 1 + np.concatenate([[0], np.cumsum(num_children)[:-1]]).astype(np.int32)
    sequence_of = np.array([ends.get(node, -1) for node in order], np.int32)
    parent_array = np.array(parents, np.int32)
    first_leaf, last_leaf, leaf_order = _leaf_ranges(parent_array, sequence_of, first_child)
    paths, lengths, depths = _paths(parent_array, sequence_of, len(sequences))
    return Trie(
        tokens=np.array(tokens, np.int32),
        parents=parent_array,
        depths=depths,
        first_child=first_child,
        num_children=num_children,
        sequence=sequence_of,
        first_leaf=first_leaf,
        last_leaf=last_leaf,
        leaf_order=leaf_order,
        paths=paths,
        lengths=lengths,
        slots=np.arange(num_children.max(), dtype=np.int32),
    )


def allowed_running_sum(trie: Trie, excluded: Bool[Array, "B M"]) -> Int[Array, "B sums"]:
    """Running count of allowed sequences in leaf order, for `num_allowed_below`."""
    allowed = ~jnp.take(excluded, trie.leaf_order, axis=1)
    return jnp.pad(jnp.cumsum(allowed, axis=1, dtype=jnp.int32), ((0, 0), (1, 0)))


def num_allowed_below(
    trie: Trie, running_sum: Int[Array, "B sums"], nodes: Int[Array, "B *more"]
) -> Int[Array, "B *more"]:
    """How many allowed sequences can still be reached from each node."""
    flat = nodes.reshape(nodes.shape[0], -1)
    last = jnp.take_along_axis(running_sum, jnp.take(trie.last_leaf, flat), axis=1)
    first = jnp.take_along_axis(running_sum, jnp.take(trie.first_leaf, flat), axis=1)
    return (last - first).reshape(nodes.shape)


def children_of(
    trie: Trie, nodes: Int[Array, "*batch"]
) -> tuple[Int[Array, "*batch C"], Bool[Array, "*batch C"]]:
    """Child nodes, padded to the largest number of children, and which of them are real."""
    slots = trie.slots.reshape((1,) * nodes.ndim + (-1,))
    real = slots < jnp.take(trie.num_children, nodes)[..., None]
    return jnp.where(real, jnp.take(trie.first_child, nodes)[..., None] + slots, ROOT), real


def _check_sequences(sequences, eos_id, vocab_size) -> None:
    if not len(sequences):
        raise InputError("A trie needs at least one description; there are no clusters.")
    seen: dict[tuple[int, ...], int] = {}
    for index, sequence in enumerate(map(tuple, sequences)):
        if not sequence or sequence[-1] != eos_id or eos_id in sequence[:-1]:
            raise InputError(
                f"Description {index} has tokens {list(sequence)}; it must end in EOS ({eos_id}) "
                "and have EOS nowhere else."
            )
        wrong = [token for token in sequence if not 0 < token < vocab_size]
        if wrong:
            raise InputError(
                f"Description {index} has token {wrong[0]}, outside the vocabulary's "
                f"1..{vocab_size - 1}. Make the vocabulary and the model from the same clusters."
            )
        if sequence in seen:
            raise InputError(
                f"Descriptions {seen[sequence]} and {index} have the same tokens {list(sequence)}: "
                "clusters must differ in words that the vocabulary can tell apart."
            )
        seen[sequence] = index


def _leaf_ranges(parents, sequence_of, first_child):
    """Leaves in depth-first order, and each node's stretch of them."""
    count = (sequence_of >= 0).astype(np.int32)
    for node in range(len(parents) - 1, 0, -1):  # children come after their parents
        count[parents[node]] += count[node]
    first = np.zeros_like(count)
    for node in range(1, len(parents)):
        parent = parents[node]
        elder = node - 1
        sibling = node != first_child[parent]
        first[node] = first[elder] + count[elder] if sibling else first[parent]
    leaves = np.flatnonzero(sequence_of >= 0)
    leaf_order = np.empty(len(leaves), np.int32)
    leaf_order[first[leaves]] = sequence_of[leaves]
    return first, first + count, leaf_order


def _paths(parents, sequence_of, num_sequences):
    depths = np.zeros(len(parents), np.int32)
    for node in range(1, len(parents)):
        depths[node] = depths[parents[node]] + 1
    leaves = np.flatnonzero(sequence_of >= 0)
    lengths = np.zeros(num_sequences, np.int32)
    lengths[sequence_of[leaves]] = depths[leaves]
    paths = np.zeros((num_sequences, depths.max()), np.int32)
    for leaf in leaves:
        row, node = paths[sequence_of[leaf]], leaf
        row[:] = leaf
        while node != ROOT:
            row[depths[node] - 1] = node
            node = parents[node]
    return paths, lengths, depths

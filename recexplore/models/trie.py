"""The allowed outputs: token sequences as a trie, flattened to arrays that live on the device.

Built once on the host in numpy; used in compiled code by pure functions of arrays. A node stands
for a beginning that several sequences share, or for the first place at which one has parted from
all others: below that the rest of a sequence is certain and needs no nodes.

    ids  sequence          nodes
    0    crime drama .     0 (root) ── 1 crime ── 3 drama   (0 ends here: the rest is certain)
    1    crime .                              └── 4 .       (1: a beginning of 0, but for its end)
    2    space opera .             └── 2 space              (2)

Nodes are numbered breadth first and by token, so that a node's children are one stretch of ids; the
sequences below a node are one stretch of the sorted sequences, their *ranks*. How many of them are
still allowed is a difference of two counts among the excluded ranks.
"""

import hashlib
from collections.abc import Sequence
from itertools import chain
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from recexplore.errors import InputError

ROOT = 0
_COMPARED_AT_ONCE = 128  # with more excluded ranks, searching them by halves is faster


class Level(NamedTuple):
    """The nodes of one depth that have children.

    Attributes:
      branching: their ids.
      alphabet: the different tokens that lead on from them.
      slots: 0 .. (largest number of children) - 1.
    """

    branching: Int[Array, "W"]
    alphabet: Int[Array, "U"]
    slots: Int[Array, "C"]


class Trie(NamedTuple):
    """M token sequences, each ending in EOS, as E nodes; node 0 is the root.

    Attributes:
      tokens: the token that leads to a node; 0 at the root.
      symbols: its place in the alphabet of the level above.
      parents: a node's parent; 0 at the root.
      first_child: the children of a node are first_child .. first_child + num_children - 1.
      num_children: 0 where only one sequence is left.
      first_leaf: the sequences below a node have the ranks first_leaf .. last_leaf - 1.
      last_leaf: see first_leaf.
      leaf_order: rank → sequence.
      leaf_rank: sequence → rank.
      paths: the nodes of each sequence from below the root on, right-padded with the last one.
      sequences: the token sequences themselves, right-padded with 0.
      lengths: number of tokens of each sequence, EOS included.
      levels: of the depths 0 .. depth - 1; deeper down nothing branches.
    """

    tokens: Int[Array, "E"]
    symbols: Int[Array, "E"]
    parents: Int[Array, "E"]
    first_child: Int[Array, "E"]
    num_children: Int[Array, "E"]
    first_leaf: Int[Array, "E"]
    last_leaf: Int[Array, "E"]
    leaf_order: Int[Array, "M"]
    leaf_rank: Int[Array, "M"]
    paths: Int[Array, "M depth"]
    sequences: Int[Array, "M T"]
    lengths: Int[Array, "M"]
    levels: tuple[Level, ...]

    @property
    def num_sequences(self) -> int:
        """M."""
        return self.lengths.shape[0]

    @property
    def max_length(self) -> int:
        """Tokens of the longest sequence, EOS included."""
        return self.sequences.shape[1]

    @property
    def depth(self) -> int:
        """How many tokens tell any two sequences apart: the branching depth."""
        return len(self.levels)

    @property
    def eos_id(self) -> Int[Array, ""]:
        """The token that ends every sequence."""
        return self.sequences[0, self.lengths[0] - 1]


def build_trie(
    sequences: Sequence[Sequence[int]], eos_id: int, vocab_size: int, pad_id: int | None = 0
) -> Trie:
    """Flattens token sequences to a trie of numpy arrays.

    Args:
      sequences: M different token sequences; each ends in `eos_id` and has it nowhere else, so that
        one may be a prefix of another but for its end.
      eos_id: the end-of-sequence token.
      vocab_size: V; all tokens are in 0 .. V - 1.
      pad_id: is padding and therefore no token; None where every id may be one.

    Returns:
      The trie; sequence i of the input is sequence i of the trie.

    Raises:
      InputError: no sequence, a sequence twice, a missing EOS, or a token outside the vocabulary.
    """
    tokens, lengths = _padded(sequences, eos_id, vocab_size, pad_id)
    leaf_order = np.lexsort(tokens.T[::-1]).astype(np.int32)
    rows = tokens[leaf_order]
    shared = _shared_with_row_above(rows, lengths, leaf_order)
    # The depth at which a row has parted from the rows above and below it.
    parted = np.maximum(shared, np.append(shared[1:], -1)) + 1
    depth = int(parted.max())
    node_of_row = np.full(len(rows), ROOT)
    nodes = {name: [np.zeros(1, np.int64)] for name in ("token", "symbol", "parent", "first")}
    last, paths, alphabets = [np.array([len(rows)])], [], []
    total = 1
    for d in range(1, depth + 1):
        opens = np.flatnonzero((shared < d) & (parted >= d))  # first row of each node
        boundaries = np.append(np.flatnonzero(shared < d), len(rows))
        alphabet, symbols = np.unique(rows[opens, d - 1], return_inverse=True)
        nodes["token"].append(rows[opens, d - 1])
        nodes["symbol"].append(symbols)
        nodes["parent"].append(node_of_row[opens])
        nodes["first"].append(opens)
        last.append(boundaries[np.searchsorted(boundaries, opens, side="right")])
        numbers = total - 1 + np.cumsum((shared < d) & (parted >= d))
        node_of_row = np.where(parted >= d, numbers, node_of_row)
        paths.append(node_of_row)
        alphabets.append(alphabet)
        total += len(opens)
    parents = np.concatenate(nodes["parent"])
    num_children = np.bincount(parents[1:], minlength=total)
    first_child = np.zeros(total, np.int64)
    first_child[parents[:0:-1]] = np.arange(total - 1, 0, -1)  # the first child is written last
    leaf_rank = np.empty_like(leaf_order)
    leaf_rank[leaf_order] = np.arange(len(rows))
    whole = np.int32
    return Trie(
        tokens=np.concatenate(nodes["token"]).astype(whole),
        symbols=np.concatenate(nodes["symbol"]).astype(whole),
        parents=parents.astype(whole),
        first_child=first_child.astype(whole),
        num_children=num_children.astype(whole),
        first_leaf=np.concatenate(nodes["first"]).astype(whole),
        last_leaf=np.concatenate(last).astype(whole),
        leaf_order=leaf_order,
        leaf_rank=leaf_rank,
        paths=np.array(paths, whole).reshape(depth, len(rows)).T[leaf_rank],
        sequences=tokens,
        lengths=lengths,
        levels=_levels(nodes["token"], alphabets, num_children),
    )


def trie_fingerprint(trie: Trie) -> str:
    """Of all sequences and their order: of what ids and tokens mean to a model.

    Args:
      trie: on the host or the device.
    """
    digest = hashlib.sha256(repr(tuple(trie.sequences.shape)).encode())
    digest.update(np.asarray(trie.sequences, "<i4").tobytes())
    return digest.hexdigest()


def exclude(trie: Trie, sequences: Int[Array, "B X"]) -> Int[Array, "B X"]:
    """The sorted ranks of sequences that are not allowed, from their ids.

    Args:
      trie: all sequences.
      sequences: ids; any may stand there twice, and -1 is none.

    Returns:
      Ranks, each once, in order; M where there is none.
    """
    count = trie.num_sequences
    ranks = jnp.take(trie.leaf_rank, jnp.clip(sequences, 0), mode="clip")
    return each_once(jnp.where(sequences < 0, count, ranks), count)


def each_once(values: Int[Array, "B X"], none: int) -> Int[Array, "B X"]:
    """The different values of each row, ascending, and `none`, which is above all, after them."""
    ordered = jnp.sort(values, axis=1)
    before = jnp.pad(ordered[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    return jnp.sort(jnp.where(ordered == before, none, ordered), axis=1)


def exclude_mask(trie: Trie, excluded: Bool[Array, "B M"]) -> Int[Array, "B M"]:
    """`exclude`, from a mask over all sequences."""
    by_rank = jnp.take(excluded, trie.leaf_order, axis=1)
    count = trie.num_sequences
    return jnp.sort(jnp.where(by_rank, jnp.arange(count)[None], count), axis=1)


def num_allowed_below(
    trie: Trie, excluded: Int[Array, "B X"], nodes: Int[Array, "B *more"]
) -> Int[Array, "B *more"]:
    """How many allowed sequences can still be reached from each node.

    Args:
      trie: all sequences.
      excluded: of `exclude`.
      nodes: node ids.
    """
    first, last = jnp.take(trie.first_leaf, nodes), jnp.take(trie.last_leaf, nodes)
    return last - first - (_count_below(excluded, last) - _count_below(excluded, first))


def first_allowed_below(
    trie: Trie, excluded: Int[Array, "B X"], nodes: Int[Array, "B N"]
) -> Int[Array, "B N"]:
    """The sequence of lowest rank that can be reached from each node and is allowed.

    Where none is, it's another node's.
    """
    first = jnp.take(trie.first_leaf, nodes)
    before = _count_below(excluded, first)
    # The i-th excluded rank less i counts the allowed ranks before it; the ranks from `first` on
    # that are excluded without a gap are those of which that count is the one at `first`.
    none = excluded == trie.num_sequences
    gaps = jnp.where(none, excluded, excluded - jnp.arange(excluded.shape[1])[None])
    skipped = _count_below(gaps, first - before + 1) - before
    rank = jnp.minimum(first + skipped, trie.num_sequences - 1)
    return jnp.take(trie.leaf_order, rank)


def which_sequence(trie: Trie, tokens: Int[Array, "*batch T"]) -> Int[Array, "*batch"]:
    """The sequences that given tokens are, EOS included; -1 for tokens that are none of them.

    Args:
      trie: all sequences.
      tokens: any, as wide as the longest sequence; 0 after the end.
    """
    # Ranks are in the order of the tokens, so the sequence is found by halves.
    count = trie.num_sequences
    low = jnp.zeros(tokens.shape[:-1], jnp.int32)
    high = jnp.full_like(low, count)
    for _ in range(count.bit_length()):
        middle = (low + high) // 2
        above = _is_after(tokens, _of_rank(trie, middle)) & (middle < high)
        low, high = jnp.where(above, middle + 1, low), jnp.where(above, high, middle)
    same = jnp.all(_of_rank(trie, low) == tokens, axis=-1)
    return jnp.where(same, jnp.take(trie.leaf_order, low, mode="clip"), -1)


def children_of(
    trie: Trie, level: Level, nodes: Int[Array, "*batch"]
) -> tuple[Int[Array, "*batch C"], Bool[Array, "*batch C"]]:
    """Children of nodes of one level, padded to its largest number of them, and which are real."""
    slots = level.slots.reshape((1,) * nodes.ndim + (-1,))
    real = slots < jnp.take(trie.num_children, nodes)[..., None]
    return jnp.where(real, jnp.take(trie.first_child, nodes)[..., None] + slots, ROOT), real


def _of_rank(trie: Trie, ranks: Int[Array, "*batch"]) -> Int[Array, "*batch T"]:
    """The tokens of the sequence of each rank; ranks too high give the last one."""
    return jnp.take(trie.sequences, jnp.take(trie.leaf_order, ranks, mode="clip"), axis=0)


def _is_after(
    tokens: Int[Array, "*batch T"], others: Int[Array, "*batch T"]
) -> Bool[Array, "*batch"]:
    """Whether tokens come after others, by the first place at which they differ."""
    place = jnp.argmax(tokens != others, axis=-1)[..., None]
    found = (jnp.take_along_axis(row, place, axis=-1)[..., 0] for row in (tokens, others))
    return jnp.greater(*found)


def _count_below(
    sorted_: Int[Array, "B X"], limits: Int[Array, "B *more"]
) -> Int[Array, "B *more"]:
    """How many values of a sorted row are smaller than each limit."""
    flat = limits.reshape(limits.shape[0], -1)
    if sorted_.shape[1] <= _COMPARED_AT_ONCE:
        count = jnp.sum(sorted_[:, None, :] < flat[:, :, None], axis=-1, dtype=jnp.int32)
    else:
        count = jax.vmap(jnp.searchsorted)(sorted_, flat)
    return count.reshape(limits.shape)


def token_range(vocab_size: int, pad_id: int | None) -> str:
    """Which ids may be tokens, for error messages.

    >>> token_range(12, 0), token_range(12, 7), token_range(12, None)
    ('1..11', '0..11 without 7, which is padding', '0..11')
    """
    if pad_id == 0:
        return f"1..{vocab_size - 1}"
    return f"0..{vocab_size - 1}" + (
        "" if pad_id is None else f" without {pad_id}, which is padding"
    )


def _padded(sequences, eos_id, vocab_size, pad_id) -> tuple[np.ndarray, np.ndarray]:
    """[M, T] and lengths [M], checked."""
    if not len(sequences):
        raise InputError("A trie needs at least one description; there are no clusters.")
    lengths = np.fromiter(map(len, sequences), np.int32, len(sequences))
    flat = np.fromiter(chain.from_iterable(sequences), np.int64, int(lengths.sum()))
    owner = np.repeat(np.arange(len(lengths)), lengths)
    padding = np.zeros(len(flat), bool) if pad_id is None else flat == pad_id
    wrong = np.flatnonzero((flat < 0) | (flat >= vocab_size) | padding)
    if len(wrong):
        raise InputError(
            f"Description {owner[wrong[0]]} has token {flat[wrong[0]]}, outside the vocabulary's "
            f"{token_range(vocab_size, pad_id)}. Make the vocabulary and the model from the same "
            "clusters."
        )
    real = np.arange(max(lengths.max(), 1))[None, :] < lengths[:, None]
    tokens = np.zeros(real.shape, np.int32)
    tokens[real] = flat
    last = tokens[np.arange(len(lengths)), np.maximum(lengths, 1) - 1]
    unended = np.flatnonzero((last != eos_id) | ((real & (tokens == eos_id)).sum(axis=1) != 1))
    if len(unended):
        raise InputError(
            f"Description {unended[0]} has tokens {list(sequences[unended[0]])}; it must end in "
            f"EOS ({eos_id}) and have EOS nowhere else."
        )
    return tokens, lengths


def _shared_with_row_above(
    rows: np.ndarray, lengths: np.ndarray, leaf_order: np.ndarray
) -> np.ndarray:
    """How many tokens each sorted row begins with that the one above begins with too; -1 at first.

    Raises:
      InputError: two rows are the same.
    """
    shared = np.full(len(rows), -1)
    alike = np.ones(len(rows) - 1, bool)
    shared[1:] = 0
    for d in range(rows.shape[1]):
        alike &= rows[1:, d] == rows[:-1, d]
        shared[1:] += alike
    twice = np.flatnonzero(alike)
    if len(twice):
        first, second = sorted(leaf_order[twice[0] : twice[0] + 2].tolist())
        tokens = rows[twice[0], : lengths[first]].tolist()
        raise InputError(
            f"Descriptions {first} and {second} have the same tokens {tokens}: clusters must "
            "differ in words that the vocabulary can tell apart."
        )
    return shared


def _levels(tokens_by_depth, alphabets, num_children) -> tuple[Level, ...]:
    levels, start = [], 0
    for depth, alphabet in enumerate(alphabets):
        count = num_children[start : start + len(tokens_by_depth[depth])]
        levels.append(
            Level(
                branching=(start + np.flatnonzero(count)).astype(np.int32),
                alphabet=alphabet.astype(np.int32),
                slots=np.arange(count.max(), dtype=np.int32),
            )
        )
        start += len(count)
    return tuple(levels)

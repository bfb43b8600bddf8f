"""The trie's arrays against beginnings that are enumerated in Python."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from recexplore.errors import InputError
from recexplore.models.trie import (
    build_trie,
    children_of,
    exclude,
    exclude_mask,
    first_allowed_below,
    num_allowed_below,
    which_sequence,
)

EOS = 1
# Of unequal length, some a beginning of others; the empty one is EOS alone.
SEQUENCES = st.lists(
    st.lists(st.integers(2, 5), max_size=4), min_size=1, max_size=12, unique_by=tuple
).map(lambda bodies: [[*body, EOS] for body in bodies])
# The counts are taken in another way for many excluded ranks than for few.
WIDTHS = pytest.mark.parametrize("width", [16, 200], ids=["few", "many"])


def beginnings(sequences):
    """The sequences that start with each beginning, as ranks: {beginning: [first, last)}."""
    found = {(): (0, len(sequences))}
    for rank, sequence in enumerate(sorted(sequences)):
        for end in range(1, len(sequence) + 1):
            first, _ = found.get(tuple(sequence[:end]), (rank, rank))
            found[tuple(sequence[:end])] = (first, rank + 1)
    return found


def nodes_of(sequences):
    """The beginnings that are nodes, in their order: those that more than one sequence comes by,
    and those that follow them."""
    ranks = beginnings(sequences)

    def shared(beginning):
        first, last = ranks[beginning]
        return last - first > 1

    nodes = [b for b in ranks if not b or shared(b[:-1])]
    return {b: ranks[b] for b in sorted(nodes, key=lambda b: (len(b), b))}


def check_arrays(trie, sequences):
    nodes = nodes_of(sequences)
    number = {beginning: place for place, beginning in enumerate(nodes)}
    children = {b: [] for b in nodes}
    for beginning in list(nodes)[1:]:
        children[beginning[:-1]].append(number[beginning])
    assert trie.tokens.tolist() == [b[-1] if b else 0 for b in nodes]
    assert trie.parents.tolist() == [number[b[:-1]] for b in nodes]
    assert trie.first_leaf.tolist() == [first for first, _ in nodes.values()]
    assert trie.last_leaf.tolist() == [last for _, last in nodes.values()]
    assert trie.num_children.tolist() == [len(ids) for ids in children.values()]
    for ids, first in zip(children.values(), trie.first_child, strict=True):
        assert ids == list(range(first, first + len(ids)))

    depth = max(map(len, nodes))
    assert trie.depth == depth and trie.paths.shape == (len(sequences), depth)
    for sequence, length, path, padded in zip(
        sequences, trie.lengths, trie.paths.tolist(), trie.sequences.tolist(), strict=True
    ):
        on_the_way = [number[b] for b in map(tuple, _cuts(sequence)) if b in number]
        assert path == on_the_way + on_the_way[-1:] * (depth - len(on_the_way))
        assert padded == sequence + [0] * (trie.max_length - length)
    assert [sequences[i] for i in trie.leaf_order] == sorted(sequences)
    assert trie.leaf_order[trie.leaf_rank].tolist() == list(range(len(sequences)))
    check_levels(trie, children)


def _cuts(sequence):
    return (sequence[:end] for end in range(1, len(sequence) + 1))


def check_levels(trie, children):
    for depth, level in enumerate(trie.levels):
        here = {b: ids for b, ids in children.items() if len(b) == depth and ids}
        below = sorted(child for ids in here.values() for child in ids)
        tokens = trie.tokens[below].tolist()
        assert len(level.branching) == len(here)
        assert sorted(level.branching) == sorted(set(trie.parents[below]))
        assert level.alphabet.tolist() == sorted(set(tokens))
        assert level.alphabet[trie.symbols[below]].tolist() == tokens
        assert level.slots.tolist() == list(range(max(map(len, here.values()))))


@settings(max_examples=150, deadline=None)
@given(sequences=SEQUENCES)
@example(sequences=[[EOS]])
@example(sequences=[[2, 3, 4, EOS]])
@example(sequences=[[2, 3, 4, 5, EOS], [2, 3, 4, EOS], [2, 3, EOS], [2, EOS], [EOS]])
def test_nodes_are_the_beginnings_that_tell_sequences_apart(sequences):
    check_arrays(build_trie(sequences, EOS, 6), sequences)


@settings(max_examples=60, deadline=None)
@given(sequences=SEQUENCES, zero=st.integers(1, 5))
def test_id_zero_may_be_any_token_where_it_is_not_padding(sequences, zero):
    swapped = {0: zero, zero: 0}
    sequences = [[swapped.get(token, token) for token in sequence] for sequence in sequences]
    eos = swapped.get(EOS, EOS)
    check_arrays(build_trie(sequences, eos, 6, pad_id=None), sequences)
    check_arrays(build_trie(sequences, eos, 7, pad_id=6), sequences)


@settings(max_examples=60, deadline=None)
@given(sequences=SEQUENCES)
def test_the_depth_is_where_the_last_two_part(sequences):
    def common(a, b):
        return next(i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y)

    pairs = [(a, b) for i, a in enumerate(sequences) for b in sequences[:i]]
    depth = max((common(a, b) + 1 for a, b in pairs), default=0)
    assert build_trie(sequences, EOS, 6).depth == depth


@settings(max_examples=10, deadline=None)
@given(sequences=SEQUENCES)
def test_children_are_padded_to_the_widest_of_their_level(sequences):
    trie = build_trie(sequences, EOS, 6)
    for level in trie.levels:
        children, real = children_of(trie, level, jnp.asarray(level.branching)[None])
        assert children.shape == (1, len(level.branching), trie.num_children[level.branching].max())
        for node, ids, own in zip(level.branching, children[0], real[0], strict=True):
            assert ids[own].tolist() == (1 + np.flatnonzero(trie.parents[1:] == node)).tolist()


def random_exclusions(random, count, rows, width):
    """Ids in any order, some of them twice, -1 between them; none, and all if there is room."""
    excluded = random.integers(-1, count, (rows, width))
    excluded[:, : width // 2][random.random((rows, width // 2)) < 0.5] = -1
    excluded[0] = -1
    if count <= width:
        excluded[1] = np.resize(np.arange(count), width)
    return excluded


def check_counts(trie, excluded, ids):
    """Every node of every row against the ranks that are left."""
    count = trie.num_sequences
    nodes = np.broadcast_to(np.arange(len(trie.tokens)), (len(ids), len(trie.tokens)))
    allowed, first = _below(trie, excluded, nodes)
    for row, banned in enumerate(ids):
        left = np.ones(count, bool)
        left[trie.leaf_rank[banned[banned >= 0]]] = False
        ranks = np.asarray(excluded[row])
        assert ranks[ranks < count].tolist() == np.flatnonzero(~left).tolist()
        before = np.concatenate([[0], np.cumsum(left)])
        expected = before[trie.last_leaf] - before[trie.first_leaf]
        np.testing.assert_array_equal(allowed[row], expected)
        for node in np.flatnonzero(expected):
            lowest = trie.first_leaf[node] + left[trie.first_leaf[node] :].argmax()
            assert first[row, node] == trie.leaf_order[lowest]


@jax.jit
def _below(trie, excluded, nodes):
    return num_allowed_below(trie, excluded, nodes), first_allowed_below(trie, excluded, nodes)


@WIDTHS
@settings(max_examples=12, deadline=None)
@given(sequences=SEQUENCES, seed=st.integers(0, 99))
@example(sequences=[[EOS]], seed=0)
def test_what_is_left_below_a_node_is_what_counting_says(width, sequences, seed):
    trie = build_trie(sequences, EOS, 6)
    ids = random_exclusions(np.random.default_rng(seed), len(sequences), 8, width)
    excluded = exclude(trie, jnp.asarray(ids))
    assert excluded.shape == ids.shape
    check_counts(trie, excluded, ids)


def test_a_mask_excludes_what_ids_exclude():
    trie = build_trie([[2, EOS], [3, 4, EOS], [2, 4, EOS], [EOS], [3, EOS]], EOS, 6)
    mask = np.random.default_rng(0).random((8, 5)) < 0.5
    mask[0], mask[1] = False, True
    ids = np.where(mask, np.arange(5), -1)
    excluded = exclude_mask(trie, jnp.asarray(mask))
    np.testing.assert_array_equal(excluded, exclude(trie, jnp.asarray(ids)))
    check_counts(trie, excluded, ids)


def test_nothing_to_exclude_may_have_no_columns():
    trie = build_trie([[2, EOS], [3, EOS]], EOS, 6)
    ids = np.zeros((2, 0), int)
    check_counts(trie, exclude(trie, jnp.asarray(ids)), ids)


@pytest.fixture(scope="module")
def large():
    random = np.random.default_rng(0)
    bodies = {tuple(random.integers(2, 30, random.integers(0, 7)).tolist()) for _ in range(9000)}
    sequences = [[*body, EOS] for body in list(bodies)[:5000]]
    assert len(sequences) == 5000
    return sequences, build_trie(sequences, EOS, 30)


def test_five_thousand_sequences_make_the_same_nodes(large):
    check_arrays(large[1], large[0])


@WIDTHS
def test_exclusion_among_five_thousand(large, width):
    trie = large[1]
    ids = random_exclusions(np.random.default_rng(1), 5000, 4, width)
    ids[2] = trie.leaf_order[1000 : 1000 + width]  # neighbours, which leave nodes with nothing
    check_counts(trie, exclude(trie, jnp.asarray(ids)), ids)


@pytest.mark.parametrize(
    ("sequences", "message"),
    [
        ([], "there are no clusters"),
        ([[2, 3]], "must end in EOS"),
        ([[2, EOS], []], "Description 1 .* must end in EOS"),
        ([[2, EOS, 3, EOS]], "EOS nowhere else"),
        ([[2, 9, EOS]], "token 9, outside the vocabulary"),
        ([[2, 0, EOS]], "token 0, outside the vocabulary"),
        ([[2, EOS], [3, EOS], [2, EOS]], "Descriptions 0 and 2 have the same tokens"),
    ],
)
def test_sequences_that_make_no_trie_are_refused(sequences, message):
    with pytest.raises(InputError, match=message):
        build_trie(sequences, EOS, 6)


def test_padding_that_is_not_zero_is_no_token_either():
    with pytest.raises(InputError, match="token 3, outside .* 0..5 without 3, which is padding"):
        build_trie([[2, 3, EOS]], EOS, 6, pad_id=3)
    with pytest.raises(InputError, match="token -1, outside the vocabulary's 0..5. Make"):
        build_trie([[2, -1, EOS]], EOS, 6, pad_id=None)
    with pytest.raises(InputError, match=r"same tokens \[0, 2, 1\]"):
        build_trie([[0, 2, EOS], [0, 2, EOS]], EOS, 6, pad_id=None)


@pytest.mark.parametrize("count", [1, 4, 9])
def test_tokens_are_known_for_the_sequence_that_they_are(count):
    bodies = [[2, 3], [], [5, 4, 2], [2], [3, 3, 3], [4], [2, 3, 5], [5, 4], [2, 2]]
    sequences = [[*body, EOS] for body in bodies[:count]]
    trie = build_trie(sequences, EOS, 6)
    every = np.stack(np.meshgrid(*[np.arange(6)] * trie.max_length), -1)
    tokens = every.reshape(-1, trie.max_length).astype(np.int32)
    known = {tuple(row): i for i, row in enumerate(trie.sequences.tolist())}
    found = jax.jit(which_sequence)(trie, tokens).tolist()
    assert found == [known.get(tuple(row), -1) for row in tokens.tolist()]
    assert sorted(i for i in found if i >= 0) == list(range(count))
    assert int(jax.device_put(trie).eos_id) == EOS

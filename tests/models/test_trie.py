"""The trie's arrays against the sequences they were made from."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recexplore.errors import InputError
from recexplore.models.trie import (
    ROOT,
    allowed_running_sum,
    build_trie,
    children_of,
    num_allowed_below,
)

EOS = 1
BODIES = st.lists(
    st.lists(st.integers(2, 5), min_size=1, max_size=4).map(tuple),
    min_size=1,
    max_size=12,
    unique=True,
)


def ended(bodies):
    return [[*body, EOS] for body in bodies]


@settings(max_examples=60, deadline=None)
@given(bodies=BODIES)
def test_paths_spell_the_sequences(bodies):
    trie = build_trie(ended(bodies), EOS, 6)
    for index, sequence in enumerate(ended(bodies)):
        path = trie.paths[index, : trie.lengths[index]]
        assert trie.tokens[path].tolist() == sequence
        assert trie.sequence[path[-1]] == index
        assert trie.parents[path].tolist() == [ROOT, *path[:-1].tolist()]


@settings(max_examples=60, deadline=None)
@given(bodies=BODIES, data=st.data())
def test_children_and_allowed_counts_are_those_of_the_prefixes(bodies, data):
    sequences = ended(bodies)
    trie = build_trie(sequences, EOS, 6)
    banned = data.draw(st.sets(st.integers(0, len(sequences) - 1)))
    excluded = jnp.asarray([[index in banned for index in range(len(sequences))]])
    nodes = jnp.arange(len(trie.tokens))
    counts = num_allowed_below(trie, allowed_running_sum(trie, excluded), nodes[None])[0]
    children, real = children_of(trie, nodes)
    prefixes = {(): ROOT}
    for index, sequence in enumerate(sequences):
        for depth, node in enumerate(trie.paths[index, : trie.lengths[index]], start=1):
            prefixes[tuple(sequence[:depth])] = int(node)
    assert sorted(prefixes.values()) == list(range(len(trie.tokens)))
    for prefix, node in prefixes.items():
        below = [i for i, s in enumerate(sequences) if tuple(s[: len(prefix)]) == prefix]
        assert counts[node] == len(set(below) - banned)
        longer = {s[len(prefix)] for s in (sequences[i] for i in below) if len(s) > len(prefix)}
        found = np.asarray(trie.tokens)[np.asarray(children[node])[np.asarray(real[node])]]
        assert sorted(found.tolist()) == sorted(longer)


@pytest.mark.parametrize(
    ("sequences", "message"),
    [
        ([], "there are no clusters"),
        ([[2, 3]], "must end in EOS"),
        ([[2, EOS, 3, EOS]], "EOS nowhere else"),
        ([[2, 9, EOS]], "token 9, outside the vocabulary"),
        ([[2, 0, EOS]], "token 0, outside the vocabulary"),
        ([[2, EOS], [3, EOS], [2, EOS]], "Descriptions 0 and 2 have the same tokens"),
    ],
)
def test_sequences_that_make_no_trie_are_refused(sequences, message):
    with pytest.raises(InputError, match=message):
        build_trie(sequences, EOS, 6)

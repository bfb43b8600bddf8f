"""Histories that begin alike go together."""

import hypothesis
import hypothesis.strategies as st
import numpy as np

from recexplore.inference.context import Prompts
from recexplore.inference.grouping import deal, split_shared


def _padded(rows, width):
    return np.array([row + [-1] * (width - len(row)) for row in rows], np.int32).reshape(-1, width)


def test_the_example():
    rows = [[0, 1], [0, 2], [0, 3], [1, 0], [2, 0]]
    batches = deal(np.array(rows, np.int32), 2)
    assert [[rows[i] for i in batch] for batch in batches] == [
        [[0, 1], [0, 2]],
        [[0, 3]],
        [[1, 0]],
        [[2, 0]],
    ]
    batches = deal(np.array(rows, np.int32), 4)
    assert [[rows[i] for i in batch] for batch in batches] == [rows[:3], rows[3:]]


def test_all_pairs_share_their_first_cluster():
    pairs = np.array([[a, b] for b in range(9) for a in range(9) if a != b], np.int32)
    batches = deal(pairs, 4)
    assert [len(batch) for batch in batches] == [4] * 18
    assert all(len(np.unique(pairs[batch, 0])) == 1 for batch in batches)


@hypothesis.settings(deadline=None)
@hypothesis.given(
    st.integers(1, 3).flatmap(
        lambda width: st.lists(
            st.lists(st.integers(0, 2), min_size=1, max_size=width), max_size=30
        ).map(lambda rows: _padded(rows, width))
    ),
    st.integers(1, 7),
)
def test_every_history_is_in_one_batch_and_few_batches_are_half_empty(histories, batch_size):
    batches = deal(histories, batch_size)
    assert sorted(np.concatenate([[], *batches]).tolist()) == list(range(len(histories)))
    assert all(1 <= len(batch) <= batch_size for batch in batches)
    assert sum(2 * len(batch) < batch_size for batch in batches) <= 1
    order = np.random.default_rng(0).permutation(len(histories))
    again = [histories[order][batch].tolist() for batch in deal(histories[order], batch_size)]
    assert again == [histories[batch].tolist() for batch in batches]


def test_prompts_are_split_where_they_part():
    tokens = np.array([[5, 6, 7, 8], [5, 6, 9, 0], [5, 6, 7, 0]], np.int32)
    shared, rest = split_shared(Prompts(tokens, np.array([4, 3, 3], np.int32)))
    assert shared.tolist() == [5, 6]
    assert rest.tokens.tolist() == [[7, 8], [9, 0], [7, 0]]
    assert rest.lengths.tolist() == [2, 1, 1]


def test_something_is_left_of_every_prompt():
    tokens = np.array([[5, 6, 0], [5, 6, 0]], np.int32)
    shared, rest = split_shared(Prompts(tokens, np.array([2, 2], np.int32)))
    assert shared.tolist() == [5] and rest.lengths.tolist() == [1, 1]

"""The order of examples: permutations, epochs, going on, packing."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recexplore.errors import InputError
from recexplore.tasks.order import (
    ABSENT,
    WINDOW_ROWS,
    ExampleOrder,
    PackedRows,
    SingleRows,
    pack,
    permuted,
)

sizes, seeds = st.integers(1, 3000), st.integers(-(2**40), 2**63)
quick = settings(max_examples=25, deadline=None)


@quick
@given(sizes, seeds, st.integers(0, 2**40))
def test_a_permutation_names_every_example_once(size, seed, epoch):
    found = permuted(np.arange(size), size, (seed, epoch))
    assert np.array_equal(np.sort(found), np.arange(size))


@quick
@given(sizes, seeds, st.data())
def test_a_place_holds_the_same_example_whoever_asks(size, seed, data):
    places = np.array(data.draw(st.lists(st.integers(0, size - 1), max_size=20)), np.int64)
    whole = permuted(np.arange(size), size, (seed,))
    assert np.array_equal(permuted(places, size, (seed,)), whole[places])


def test_billions_of_examples_need_no_memory():
    size = 10**12 + 7
    found = permuted(np.arange(10_000), size, (1, 0))
    assert len(set(found.tolist())) == 10_000
    assert 0 <= found.min() < size / 100 and size * 0.99 < found.max() < size


@pytest.mark.parametrize("size", [2, 3, 5, 7, 16])
def test_every_example_comes_first_equally_often(size):
    firsts = [permuted(np.arange(size), size, (0, epoch)) for epoch in range(1000)]
    counts = np.stack([np.bincount(column, minlength=size) for column in np.array(firsts).T])
    deviations = (counts - 1000 / size) / np.sqrt(1000 / size * (1 - 1 / size))
    assert np.abs(deviations).max() < 5  # of up to 256 standard normals


def test_keys_of_other_numbers_give_other_orders():
    keys = [(2**32 + 5, 3), (5, 1, 3), (5, 3), (2**33 + 5, 3), (5, 2**32 + 3)]
    found = {tuple(permuted(np.arange(100), 100, key).tolist()) for key in keys}
    assert len(found) == len(keys)


def test_neighbours_do_not_stay_neighbours():
    size = 100_000
    found = permuted(np.arange(size), size, (3, 1))
    assert abs(np.corrcoef(found[:-1], found[1:])[0, 1]) < 0.02
    other = permuted(np.arange(size), size, (3, 2))
    assert abs(np.corrcoef(found, other)[0, 1]) < 0.02


def lengths_of(size, longest, seed=0):
    return np.random.default_rng(seed).integers(1, longest + 1, size)


PACKED = {"epoch": 0, "at": 0, "row": 0, "max_length": 12, "examples_per_row": 3}


def rows_of(size, packed, *, seed=1, repeat=True, max_length=12, examples_per_row=3):
    order = ExampleOrder(size, seed)
    if not packed:
        return SingleRows(order, repeat)
    lengths = lengths_of(size, max_length)
    return PackedRows(order, lambda ids: lengths[ids], max_length, examples_per_row, repeat=repeat)


def read(rows, place, counts):
    """The examples of each take, flat, and all places passed."""
    found, places = [], [place]
    for count in counts:
        ids, place = rows.take(place, count)
        found.append(ids[ids != ABSENT].tolist())
        places.append(place)
    return found, places


@quick
@given(st.integers(1, 700), st.integers(1, 90), st.booleans(), st.booleans())
def test_an_epoch_holds_every_example_once(size, count, packed, shuffled):
    rows = rows_of(size, packed, seed=7 if shuffled else None, repeat=False)
    takes, place = [], rows.start
    while len((ids := rows.take(place, count))[0]):
        place = ids[1]
        takes += ids[0][ids[0] != ABSENT].tolist()
    assert sorted(takes) == list(range(size))
    if not packed and not shuffled:
        assert takes == list(range(size))


@quick
@given(st.integers(1, 200), st.integers(1, 50), st.booleans())
def test_epoch_follows_epoch_without_loss(size, count, packed):
    rows = rows_of(size, packed)
    flat, place = [], rows.start
    while len(flat) < 3 * size:
        (ids,), (_, place) = read(rows, place, [count])
        flat += ids
    epochs = [flat[i * size : (i + 1) * size] for i in range(3)]
    assert all(sorted(epoch) == list(range(size)) for epoch in epochs)
    assert size < 20 or epochs[0] != epochs[1] != epochs[2]


@quick
@given(
    st.integers(1, 300),
    st.lists(st.integers(1, 100), min_size=1, max_size=12),
    st.booleans(),
    st.data(),
)
def test_going_on_from_any_place_gives_the_same_rest(size, counts, packed, data):
    found, places = read(rows_of(size, packed), rows_of(size, packed).start, counts)
    at = data.draw(st.integers(0, len(counts)))
    fresh = rows_of(size, packed)
    fresh.check(places[at])
    assert read(fresh, places[at], counts[at:]) == (found[at:], places[at:])


@quick
@given(st.integers(1, 150), st.integers(1, 40), st.integers(1, 6), st.integers(0, 99))
def test_packing_keeps_every_example_and_never_overflows(size, longest, per_row, seed):
    lengths = lengths_of(size, longest, seed)
    rows = pack(lengths, 40, per_row)
    assert sorted(rows[rows != ABSENT].tolist()) == list(range(size))
    held = np.where(rows == ABSENT, 0, lengths[rows])
    assert held.sum(axis=1).max() <= 40
    assert (held[:, 0] > 0).all()  # examples first, then what is absent
    assert (np.diff((rows == ABSENT).astype(int), axis=1) >= 0).all()
    not_full = (rows == ABSENT).any(axis=1)
    free = 40 - held.sum(axis=1)
    for earlier in np.flatnonzero(not_full):  # first fit: what came later didn't fit before
        later = held[earlier + 1 :]
        assert (later[later > 0] > free[earlier]).all()


def test_packed_rows_are_nearly_full():
    rows = rows_of(5000, True, max_length=100, examples_per_row=50, repeat=False)
    lengths = lengths_of(5000, 100)
    ids, _ = rows.take(rows.start, 5000)
    assert lengths.sum() / (len(ids) * 100) > 0.95
    assert len(ids) > 5 * WINDOW_ROWS


@pytest.mark.parametrize(
    ("packed", "place"),
    [
        (False, {"epoch": 0, "at": 100}),
        (False, {"epoch": 0, "at": -1}),
        (False, {"epoch": 0, "at": 0, "row": 0}),
        (True, {"epoch": 0, "at": 0}),
        (True, {"epoch": 0, "at": 0, "row": 0}),
        (True, {**PACKED, "row": 100}),
        (True, {**PACKED, "max_length": 13}),
        (True, {**PACKED, "examples_per_row": 4}),
        (True, {}),
    ],
)
def test_a_place_of_other_data_is_refused(packed, place):
    with pytest.raises(InputError, match="is none of these training examples.*packs?"):
        rows_of(100, packed).check(place)


def test_rows_without_room_for_an_example_are_refused():
    with pytest.raises(InputError, match="pipeline.train.examples_per_row is 0"):
        rows_of(10, True, examples_per_row=0)

"""Item sequences: nothing of later periods, every item predicted once, batches that resume."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recexplore.errors import InputError
from recexplore.feedback.engagements import Engagements
from recexplore.tasks import item_sequences, item_tasks
from recexplore.tasks.item_sequences import Window, cut

# seqio and tensorflow warn of their own ways
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
T, NUM_ITEMS = 3, 50


@given(st.integers(0, 30), st.integers(0, 30), st.integers(1, 6), st.integers(1, 6))
def test_every_item_is_predicted_once_from_its_neighbours(count, first, max_items, context):
    context = min(context, max_items)
    items = np.arange(100, 100 + count)
    windows = cut(items, first, max_items, context)
    predicted = [w.items[w.context :].tolist() for w in windows]
    assert [i for each in predicted for i in each] == items[first:].tolist()
    for window in windows:
        assert 1 <= len(window.items) <= max_items + 1
        assert np.all(np.diff(window.items) == 1)
        begins = window.items[0] == 100
        assert window.context >= context or begins  # as much as there is


def test_the_example_of_the_docstring():
    first, second = cut(np.arange(7), 0, 3, 1)
    assert (first.items.tolist(), first.context) == ([0, 1, 2, 3], 0)
    assert (second.items.tolist(), second.context) == ([3, 4, 5, 6], 1)


def some_engagements(seed=0):
    random = np.random.default_rng(seed)
    counts = random.integers(0, 20, 12)
    times = [np.sort(random.integers(0, 100, n)) for n in counts]
    items = [random.permutation(NUM_ITEMS)[:n] for n in counts]
    return Engagements(
        np.array([f"u{u}" for u in range(12)], object),
        np.concatenate([[0], np.cumsum(counts)]),
        np.concatenate(items),
        np.concatenate(times),
        random.random(counts.sum()) < 0.7,
    )


def test_nothing_later_is_in_a_window_and_no_skipped_item():
    met = some_engagements()
    sizes = {"max_items": T, "context": 2}
    train = item_sequences.train_windows(met, until=60, **sizes)
    kept = met.items[met.engaged & (met.times < 60)]
    predicted = np.concatenate([w.items[w.context :] for w in train])
    assert sorted(predicted.tolist()) == sorted(kept.tolist())
    assert {i for w in train for i in w.items.tolist()} <= set(kept.tolist())
    later = item_sequences.held_out_windows(met, start=60, until=80, **sizes)
    kept = met.items[met.engaged & (met.times >= 60) & (met.times < 80)]
    predicted = np.concatenate([w.items[w.context :] for w in later])
    assert sorted(predicted.tolist()) == sorted(kept.tolist())


WINDOWS = [
    w
    for seed in range(9)
    for w in cut(np.random.default_rng(seed).permutation(NUM_ITEMS)[: 2 + seed], 0, T, 1)
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("sequences")
    for split in ("train", "validation"):
        item_tasks.write_windows(WINDOWS, path, split)
    return path


def data(folder, **changes):
    sizes = {"seed": 3, "batch_size": 4, "max_items": T, "num_items": NUM_ITEMS} | changes
    return item_tasks.ItemData(item_tasks.make_task("items", folder, NUM_ITEMS), folder, **sizes)


def test_batches_hold_the_windows(folder):
    batches = data(folder).validation(np.arange(4))
    whole = {name: np.concatenate([b[name] for b in batches]) for name in batches[0]}
    assert len(whole["tokens"]) == -(-len(WINDOWS) // 4) * 4
    for row, window in enumerate(WINDOWS):
        read = window.items[:T].tolist()
        assert whole["tokens"][row].tolist() == [*read, *[-1] * (T - len(read))]
        assert whole["lengths"][row] == len(read)
        wanted = [-1] * window.context + window.items[window.context :].tolist()
        assert whole["targets"][row].tolist() == [*wanted, *[-1] * (T + 1 - len(wanted))]
        assert whole["example_id"][row] == row
    assert np.all(whole["targets"][len(WINDOWS) :] == -1)


def test_an_epoch_has_every_window_once_and_a_run_resumes_at_its_place(folder):
    batches = data(folder).training(np.arange(4))
    seen = []
    for _ in range(3):
        seen += next(batches)["example_id"].tolist()
    place = batches.position()
    rest = [next(batches) for _ in range(4)]
    resumed = data(folder).training([1, 2])
    resumed.move_to(place)
    for batch in rest:
        again = next(resumed)
        for name, values in again.items():
            np.testing.assert_array_equal(values, batch[name][[1, 2]])
        seen += batch["example_id"].tolist()
    assert sorted(seen[: len(WINDOWS)]) == [*range(len(WINDOWS))]


def test_what_does_not_fit_is_named(folder, tmp_path):
    with pytest.raises(InputError, match="another items.tokenize.max_items"):
        data(folder, max_items=2).validation(np.arange(4))
    with pytest.raises(InputError, match="no item that a user engaged with"):
        item_tasks.write_windows([Window(np.array([1, 2]), 0)] * 4, tmp_path, "train")
        item_tasks.write_windows([], tmp_path, "validation")
        data(tmp_path)

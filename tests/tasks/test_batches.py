"""Batches: the same for any number of processes, resumed exactly, packed without loss."""

import pickle
import shutil

import numpy as np
import pytest
import seqio

from recexplore.errors import InputError
from recexplore.tasks import example_files, seqio_tasks
from recexplore.tasks.examples import Example
from recexplore.tasks.prompts import alignment_prompt
from recexplore.tasks.rows import NOTHING, Shape, packed_rows, single_rows
from recexplore.tasks.vocabulary import EOS_ID, Vocabulary, train_vocabulary

DESCRIPTIONS = ["space opera", "slow cooking", "space travel", "opera arias", "rain"]
# seqio and tensorflow warn of their own ways
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def some_examples(count, pairs=False):
    random = np.random.default_rng(0)
    made = []
    for i in range(count):
        history = random.integers(0, 5, random.integers(1, 5))
        better, worse = random.permutation(5)[:2]
        made.append(
            Example(
                alignment_prompt([DESCRIPTIONS[c] for c in history]),
                DESCRIPTIONS[better],
                seen=history.tolist(),
                label=i / count,
                weight=1.0 + i,
                rejected=DESCRIPTIONS[worse] if pairs else "",
            )
        )
    return made


EXAMPLES, PAIRS = some_examples(45), some_examples(45, pairs=True)


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vocabulary")
    prompts = [example.inputs for example in EXAMPLES]
    train_vocabulary(folder, prompts, DESCRIPTIONS, size=60, whole_descriptions=False)
    return Vocabulary(folder)


@pytest.fixture(scope="module")
def written(tmp_path_factory, vocabulary):
    folder = tmp_path_factory.mktemp("examples")
    for name, examples in (("single", EXAMPLES), ("pairs", PAIRS)):
        seqio_tasks.write_examples(examples, folder / name, "train", vocabulary)
    return folder


@pytest.fixture(scope="module")
def make(written, vocabulary):
    """Batches of all settings that aren't given."""
    tasks = {}

    def made(rows=None, *, folder=None, pairs=False, **options):
        folder = folder or written / ("pairs" if pairs else "single")
        if folder not in tasks:
            tasks[folder] = seqio_tasks.make_task(folder.name, folder, vocabulary)
        longest = max(len(vocabulary.encode_description(d)) for d in DESCRIPTIONS)
        prompt = max(len(vocabulary.encode(example.inputs)) for example in EXAMPLES)
        settings = {
            "batch_size": 8,
            "max_length": prompt + longest,
            "longest_description": longest,
            "prefix_length": len(vocabulary.prefix),
            "num_clusters": 5,
            "shuffle": True,
            "seed": 3,
            "repeat": True,
        }
        return seqio_tasks.Batches(tasks[folder], folder, "train", rows, **settings | options)

    return made


KINDS = [{}, {"pairs": True}, {"pack": True, "examples_per_row": 3, "max_length": 90}]


def rows_of_process(process, processes):
    """Not neighbours: devices may hold any rows."""
    return list(range(process, 8, processes))


def together(parts):
    """Rows of several processes' batches, in the batch's order."""
    processes = len(parts)
    whole = {name: np.empty((8, *x.shape[1:]), x.dtype) for name, x in parts[0].items()}
    for process, part in enumerate(parts):
        for name, values in part.items():
            whole[name][rows_of_process(process, processes)] = values
    return whole


def assert_equal(one, other):
    assert one.keys() == other.keys()
    for name in one:
        assert one[name].dtype == other[name].dtype
        assert np.array_equal(one[name], other[name]), name


def test_validation_batches_are_kept_without_their_masks(tmp_path, vocabulary):
    for split in ("train", "validation"):
        seqio_tasks.write_examples(EXAMPLES, tmp_path, split, vocabulary)
    task = seqio_tasks.make_task("kept", tmp_path, vocabulary)
    settings = {
        "batch_size": 6,
        "max_length": 90,
        "longest_description": max(len(vocabulary.encode_description(d)) for d in DESCRIPTIONS),
        "prefix_length": len(vocabulary.prefix),
        "num_clusters": 3000,
        "pack": True,
    }
    found = seqio_tasks.Data(task, tmp_path, seed=0, **settings).validation(range(1, 6, 2))
    plain = list(seqio_tasks.Batches(task, tmp_path, "validation", range(1, 6, 2), **settings))
    assert len(found) == len(plain) > 0
    for _ in range(2):
        for batch, expected in zip(found, plain, strict=True):
            assert_equal(batch, expected)
    assert len(pickle.dumps(found)) < sum(batch["seen"].nbytes for batch in plain) / 10


@pytest.mark.parametrize("kind", KINDS, ids=["single", "pairs", "packed"])
def test_a_batch_without_repetition_must_be_possible(make, tmp_path, vocabulary, kind):
    examples = PAIRS if kind.get("pairs") else EXAMPLES
    for split in ("train", "validation"):
        seqio_tasks.write_examples(examples, tmp_path, split, vocabulary)
    task = seqio_tasks.make_task("all", tmp_path, vocabulary)
    shapes = {"max_length": 90, "num_clusters": 5, "prefix_length": len(vocabulary.prefix)}
    shapes["longest_description"] = max(len(vocabulary.encode_description(d)) for d in DESCRIPTIONS)
    shapes |= {name: value for name, value in kind.items() if name != "pairs"}
    epoch = make(repeat=False, batch_size=1, **{"max_length": 90, **kind})
    most = len(list(epoch))  # rows
    assert most < 30 if "pack" in kind else most == 45

    def first_of(batch_size):
        data = seqio_tasks.Data(task, tmp_path, seed=3, batch_size=batch_size, **shapes)
        return next(data.training(range(batch_size)))

    ids = first_of(most)["example_id"]
    assert sorted(ids[ids >= 0].tolist()) == list(range(45))
    for batch_size in (most + 1, 10**12):
        with pytest.raises(InputError) as raised:
            first_of(batch_size)
        assert f"pipeline.train.batch_size is {batch_size}, but " in str(raised.value)
        assert "has 45 training examples" in str(raised.value)
        assert f"bind {most} at most" in str(raised.value)


@pytest.mark.parametrize("kind", KINDS, ids=["single", "pairs", "packed"])
def test_any_number_of_processes_sees_the_same_batches(make, kind):
    alone = make(**kind)
    expected = [next(alone) for _ in range(8)]
    for processes in (2, 4):
        parts = [make(rows_of_process(p, processes), **kind) for p in range(processes)]
        for batch in expected:
            assert_equal(together([next(part) for part in parts]), batch)
        assert {str(part.position()) for part in parts} == {str(alone.position())}


@pytest.mark.parametrize("kind", KINDS, ids=["single", "pairs", "packed"])
def test_another_number_of_processes_goes_on_exactly(make, kind):
    first = make(rows_of_process(1, 2), **kind)
    for _ in range(7):  # into the second epoch
        next(first)
    place = first.position()
    assert all(type(number) is int for number in place.values())
    alone = make(**kind)
    alone.move_to(place)
    one_of_four = make(rows_of_process(3, 4), **kind)
    next(one_of_four)
    one_of_four.move_to(place)
    for _ in range(8):
        whole = next(alone)
        for batches, processes, process in ((first, 2, 1), (one_of_four, 4, 3)):
            rows = rows_of_process(process, processes)
            assert_equal(next(batches), {name: x[rows] for name, x in whole.items()})


def test_restarting_gives_the_first_batch_again_and_epochs_differ(make):
    batches = make(batch_size=9)
    first = [next(batches)["example_id"].tolist() for _ in range(10)]
    batches.restart()
    assert [next(batches)["example_id"].tolist() for _ in range(10)] == first
    epochs = sum(first[:5], []), sum(first[5:], [])
    assert epochs[0] != epochs[1] and sorted(epochs[0]) == sorted(epochs[1]) == list(range(45))
    assert next(make(batch_size=9, seed=4))["example_id"].tolist() != first[0]


def test_rows_without_examples_weigh_nothing(make):
    for options in ({}, {"pack": True, "max_length": 90, "examples_per_row": 3}):
        whole = list(make(repeat=False, shuffle=False, **options))
        last = list(make([6, 7], repeat=False, shuffle=False, **options))
        assert len(last) == len(whole)
        for part, batch in zip(last, whole, strict=True):
            assert_equal(part, {name: x[[6, 7]] for name, x in batch.items()})
        absent = whole[-1]["example_id"] < 0
        assert absent.any() and (whole[-1]["weight"][absent] == 0).all()
        assert (whole[-1]["prompt_lengths"][absent] == 1).all()
        ids = np.concatenate([batch["example_id"].ravel() for batch in whole])
        assert sorted(ids[ids >= 0].tolist()) == list(range(45))


def test_packed_rows_say_what_single_rows_say(make, vocabulary):
    single = {}
    for batch in make(repeat=False):
        for row in np.flatnonzero(batch["example_id"] >= 0):
            single[batch["example_id"][row]] = {name: x[row] for name, x in batch.items()}
    count = 0
    for batch in make(repeat=False, pack=True, examples_per_row=4, max_length=90):
        used = np.zeros_like(batch["tokens"], bool)
        for row, slot in zip(*np.nonzero(batch["example_id"] >= 0), strict=True):
            of = {name: x[row, slot] for name, x in batch.items() if x.shape[1] == 4}
            alone = single[of["example_id"]]
            start, length = of["starts"], of["lengths"]
            where = slice(start, start + length)
            assert length == alone["lengths"] and of["prompt_lengths"] == alone["prompt_lengths"]
            assert np.array_equal(batch["tokens"][row, where], alone["tokens"][:length])
            assert (batch["segment_ids"][row, where] == slot + 1).all()
            assert np.array_equal(batch["positions"][row, where], np.arange(length))
            assert np.array_equal(of["seen"], alone["seen"])
            assert (of["label"], of["weight"]) == (alone["label"], alone["weight"])
            example = EXAMPLES[of["example_id"]]
            split = start + of["prompt_lengths"]
            tokens = batch["tokens"][row].tolist()
            assert vocabulary.decode(tokens[start:split]) == example.inputs
            assert vocabulary.decode(tokens[split : start + length]) == example.targets
            assert not used[row, where].any()
            used[row, where] = True
            count += 1
        for name in ("tokens", "segment_ids", "positions"):
            assert (batch[name][~used] == 0).all()
        absent = batch["example_id"] < 0
        for name in ("starts", "lengths", "weight"):
            assert (batch[name][absent] == 0).all()
    assert count == 45


def test_pairs_hold_both_descriptions(make, vocabulary):
    batch = next(make(pairs=True, shuffle=False))
    for row, example in enumerate(PAIRS[:8]):
        split = batch["prompt_lengths"][row]
        for tokens, lengths, text in (
            ("tokens", "lengths", example.targets),
            ("other_tokens", "other_lengths", example.rejected),
        ):
            found, length = batch[tokens][row], batch[lengths][row]
            assert vocabulary.decode(found[:split].tolist()) == example.inputs
            assert found[split:length].tolist() == vocabulary.encode_description(text)
            assert found[length - 1] == EOS_ID and not found[length:].any()


def test_rows_are_laid_out_as_the_documentation_shows():
    examples = {
        "inputs": np.array([[5, 6], [7, NOTHING]]),
        "targets": np.array([[1], [1]]),
        "seen": np.array([[0, 2], [NOTHING, NOTHING]]),
        "label": np.array([0.5, 1.0]),
        "weight": np.array([1.0, 2.0]),
    }
    shape = Shape(max_length=6, room=5, prefix_length=1, num_clusters=3)
    (tokens,) = packed_rows(examples, np.array([[4, 9, -1]]), shape)["tokens"]
    assert tokens.tolist() == [5, 6, 1, 7, 1, 0]
    packed = packed_rows(examples, np.array([[4, 9, -1]]), shape)
    assert packed["segment_ids"].tolist() == [[1, 1, 1, 2, 2, 0]]
    assert packed["positions"].tolist() == [[0, 1, 2, 0, 1, 0]]
    assert packed["starts"].tolist() == [[0, 3, 0]] and packed["lengths"].tolist() == [[3, 2, 0]]
    assert packed["seen"].tolist() == [[[True, False, True], [False] * 3, [False] * 3]]
    single = single_rows(examples, np.array([[4], [-1], [9]]), shape)
    assert single["tokens"].tolist() == [[5, 6, 1, 0, 0, 0], [0] * 6, [7, 1, 0, 0, 0, 0]]
    assert single["lengths"].tolist() == [3, 1, 2]


def test_anyone_can_read_the_task(make, written, vocabulary):
    for pairs in (False, True):
        folder = written / ("pairs" if pairs else "single")
        task = seqio_tasks.make_task("plain", folder, vocabulary)
        assert isinstance(task, seqio.Task)
        rows = task.get_dataset(split="train", shuffle=False, try_in_mem_cache=False)
        rows = {int(row["example_id"]): row for row in rows.as_numpy_iterator()}
        assert sorted(rows) == list(range(45))
        for index, example in enumerate(PAIRS if pairs else EXAMPLES):
            assert rows[index]["inputs"].tolist() == vocabulary.encode(example.inputs)
            assert rows[index]["targets"].tolist() == vocabulary.encode_description(example.targets)
            assert ("rejected" in rows[index]) == pairs


def damaged(written, folder, path, change):
    shutil.copytree(written / "single", folder, dirs_exist_ok=True)
    content = bytearray((folder / path).read_bytes())
    (folder / path).write_bytes(change(content))
    return folder


SHARD, INDEX = "train-00003-of-00016.tfrecord", "train.index.npy"


def flipped(content):
    content[40] ^= 1
    return content


@pytest.mark.parametrize(
    ("path", "change", "message"),
    [
        (SHARD, lambda content: content[:-1], f"train.index.npy doesn't match.*{SHARD} has"),
        (SHARD, flipped, "train.index.npy doesn't match.*example 3 in shard 3"),
        (INDEX, lambda content: content[:-1], "train.index.npy is damaged"),
        (INDEX, lambda content: b"", "train.index.npy is damaged"),
        (INDEX, lambda content: content.replace(b"checksum", b"otherrrr"), "this version"),
    ],
)
def test_damaged_files_are_named(make, written, tmp_path, path, change, message):
    folder = damaged(written, tmp_path / "single", path, change)
    with pytest.raises(InputError, match=f"(?s){message}.*recexplore tokenize` *again"):
        next(make(folder=folder, shuffle=False))


def test_a_missing_index_is_named(make, written, tmp_path):
    folder = damaged(written, tmp_path / "single", SHARD, bytes)
    (folder / INDEX).unlink()
    with pytest.raises(InputError, match=r"train.index.npy is missing. Run `recexplore tokenize`"):
        make(folder=folder)


def test_examples_of_another_vocabulary_or_other_clusters_are_noticed(
    make, written, tmp_path, vocabulary
):
    folder = tmp_path / "single"
    shutil.copytree(written / "single", folder)
    index = np.load(folder / INDEX)
    index["inputs"][0] += 1
    example_files.write_index(folder, "train", index)
    with pytest.raises(InputError, match="another vocabulary.*tokens are not those"):
        next(make(folder=folder, shuffle=False))
    with pytest.raises(InputError, match="name clusters that there are not"):
        next(make(num_clusters=2))
    with pytest.raises(InputError, match="longer than the longest of the clusters"):
        for batch in make(max_length=len(vocabulary.prefix) + 2, longest_description=1):
            del batch


@pytest.mark.parametrize("rows", [[-1], [8], [0, 8], []])
def test_rows_that_are_not_in_the_batch_are_a_programming_error(make, rows):
    with pytest.raises(ValueError, match="of a batch of 8"):
        make(rows)


def test_what_cannot_be_packed_is_refused(make, written, vocabulary, tmp_path):
    with pytest.raises(InputError, match="pairs, which can't be packed"):
        make(pairs=True, pack=True)
    with pytest.raises(InputError, match="is none of these training examples"):
        make(pack=True).move_to(make().position())
    with pytest.raises(ValueError, match="Some examples have a worse description"):
        seqio_tasks.write_examples([EXAMPLES[0], PAIRS[0]], tmp_path, "train", vocabulary)

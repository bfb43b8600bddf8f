"""The item recommender's SeqIO task, and the batches that it trains on.

What `seqio_tasks` is for the models that read words; items need no vocabulary, as they are numbers
from the beginning. The files, the order of examples and reading ahead are the same.
"""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import seqio
import tensorflow as tf
from jaxtyping import Int

from recexplore.errors import InputError
from recexplore.tasks import example_files, order
from recexplore.tasks.example_files import NUM_SHARDS, ExampleFiles
from recexplore.tasks.example_stream import ExampleStream
from recexplore.tasks.item_sequences import Window
from recexplore.tasks.rows import NOTHING

FEATURES = {
    "items": tf.io.RaggedFeature(tf.int64),
    "context": tf.io.FixedLenFeature([], tf.int64),
    "example_id": tf.io.FixedLenFeature([], tf.int64),
}
Batch = dict[str, np.ndarray]
Rows = Sequence[int] | Int[np.ndarray, "R"]


def write_windows(windows: Sequence[Window], folder: Path, split: str) -> None:
    """Writes windows as TFRecord shards, with an index beside them; see `example_files`.

    Args:
      windows: of one split.
      folder: made if it isn't there.
      split: train or validation.
    """
    folder.mkdir(parents=True, exist_ok=True)
    records = [_as_proto(window, index) for index, window in enumerate(windows)]
    example_files.write_records(folder, split, records, tf.io.TFRecordWriter)
    index = example_files.entries(records)
    index["inputs"] = [window.context for window in windows]
    index["targets"] = [len(window.items) - window.context for window in windows]
    example_files.write_index(folder, split, index)


def _as_proto(window: Window, index: int) -> bytes:
    def numbers(values: Sequence[int]) -> tf.train.Feature:
        return tf.train.Feature(int64_list=tf.train.Int64List(value=values))

    features = {
        "items": numbers(window.items.tolist()),
        "context": numbers([window.context]),
        "example_id": numbers([index]),
    }
    proto = tf.train.Example(features=tf.train.Features(feature=features))
    return proto.SerializeToString(deterministic=True)


def make_task(name: str, folder: Path, num_items: int) -> seqio.Task:
    """A SeqIO task over shards written by `write_windows`.

    Args:
      name: of the task.
      folder: where its shards are.
      num_items: I.
    """
    shards = {
        split: os.fspath(folder / f"{split}-*-of-{NUM_SHARDS:05d}.tfrecord")
        for split in ("train", "validation")
    }
    items = seqio.Feature(
        seqio.PassThroughVocabulary(num_items), add_eos=False, dtype=tf.int64, required=False
    )
    return seqio.Task(
        name,
        source=seqio.TFExampleDataSource(shards, FEATURES),
        preprocessors=[],
        output_features={"items": items},
    )


class ItemData:
    """The training and the validation batches of item sequences, for a trainer.

    Args:
      task: from `make_task`.
      folder: where its windows are.
      seed: of the training windows' order.
      batch_size: B, of all processes together.
      max_items: T.
      num_items: I.

    Raises:
      InputError: a split has no windows, or their files are damaged.
    """

    def __init__(
        self,
        task: seqio.Task,
        folder: Path,
        *,
        seed: int,
        batch_size: int,
        max_items: int,
        num_items: int,
    ):
        self.batch_size = batch_size
        self._task, self._folder, self._seed = task, folder, seed
        self._shape = (max_items, num_items)
        for split in ("train", "validation"):
            ExampleFiles(folder, split)

    def training(self, rows: Rows) -> "ItemBatches":
        """Some rows of endless training batches."""
        return self._make("train", rows, self._seed)

    def validation(self, rows: Rows) -> list[Batch]:
        """Some rows of the validation split's batches."""
        return list(self._make("validation", rows, None))

    def _make(self, split: str, rows: Rows, seed: int | None) -> "ItemBatches":
        sizes = (self.batch_size, *self._shape)
        return ItemBatches(self._task, self._folder, split, rows, *sizes, seed)


class ItemBatches:
    """Batches of windows that know their place: a function of the seed and the place alone.

    A batch has `tokens` int32 [R, T], the items that are read, and `targets` int32 [R, T + 1], of
    which the t-th is to be predicted from the first t of `tokens`; −1 where there is none. For
    T = 3, the second window of `item_sequences.cut`'s example, which has the item 3 for context:

        tokens    3  4  5
        targets  −1  4  5  6

    `lengths` int32 [R] are the items read and `example_id` int64 [R] the windows' numbers, −1 in a
    last batch's rows that aren't filled.

    Args:
      task: from `make_task`.
      folder: where its windows are.
      split: train or validation.
      rows: which of a batch's B rows this process wants.
      batch_size: B, of all processes together.
      max_items: T.
      num_items: I.
      seed: of the order, which is another in every epoch; None: one epoch, in the windows' order.
    """

    def __init__(
        self,
        task: seqio.Task,
        folder: Path,
        split: str,
        rows: Rows,
        batch_size: int,
        max_items: int,
        num_items: int,
        seed: int | None,
    ):
        self._folder, self._max_items, self._num_items = folder, max_items, num_items
        files = ExampleFiles(folder, split)
        rows_in_order = order.SingleRows(
            order.ExampleOrder(len(files), seed), repeat=seed is not None
        )
        self._stream = ExampleStream(
            task, FEATURES, files, rows_in_order, np.array(rows, np.int64), batch_size
        )

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        grid, windows = self._stream.next_batch()
        there = grid[:, 0] != order.ABSENT
        items = np.full((len(grid), self._max_items + 1), NOTHING, np.int32)
        found = windows["items"]
        if found.shape[1] > items.shape[1] or found.max(initial=0) >= self._num_items:
            raise InputError(
                f"The windows in {self._folder} were written with another items.tokenize.max_items "
                "or other items. Run `recexplore tokenize` again."
            )
        items[there, : found.shape[1]] = found
        context = np.zeros(len(grid), np.int64)
        context[there] = windows["context"]
        targets = np.where(np.arange(items.shape[1]) < context[:, None], NOTHING, items)
        tokens = items[:, :-1]
        return {
            "tokens": tokens,
            "targets": targets,
            "lengths": np.sum(tokens != NOTHING, axis=1, dtype=np.int32),
            "example_id": grid[:, 0].astype(np.int64),
        }

    def position(self) -> order.Place:
        """The place of the next batch."""
        return self._stream.position()

    def move_to(self, position: order.Place) -> None:
        """Goes to a place that `position` returned for the same windows."""
        self._stream.move_to(position)

"""The examples of batch after batch, read at random and tokenised ahead of their use."""

import collections
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import seqio
import tensorflow as tf
from jaxtyping import Int

from recexplore.tasks.example_files import ExampleFiles
from recexplore.tasks.order import ABSENT, Place, RowOrder
from recexplore.tasks.rows import NOTHING

FEATURES = {
    "inputs": tf.io.FixedLenFeature([], tf.string),
    "targets": tf.io.FixedLenFeature([], tf.string),
    "seen": tf.io.RaggedFeature(tf.int64),
    "label": tf.io.FixedLenFeature([], tf.float32),
    "weight": tf.io.FixedLenFeature([], tf.float32),
    "example_id": tf.io.FixedLenFeature([], tf.int64),
}
PAIR_FEATURES = {**FEATURES, "rejected": tf.io.FixedLenFeature([], tf.string)}
_BATCHES_AHEAD = 4
_THREADS = 2  # batches at work at once; within each, TensorFlow has threads of its own
Arrays = dict[str, np.ndarray]


class ExampleStream:
    """Hands out the examples of this process's rows, batch after batch.

    A batch is read and tokenised as one call of a compiled TensorFlow function, some batches ahead,
    in threads that are always waited for: an endless tf.data iterator that called back into Python
    could not be closed safely.

    Args:
      task: its preprocessors turn one example into one, always the same.
      features: what a record holds.
      files: the examples.
      row_order: which of them a row holds.
      rows: which of a batch's rows this process wants.
      batch_size: B.
    """

    def __init__(
        self,
        task: seqio.Task,
        features: Mapping[str, Any],
        files: ExampleFiles,
        row_order: RowOrder,
        rows: Int[np.ndarray, "R"],
        batch_size: int,
    ):
        self._files, self._order, self._rows, self._batch_size = files, row_order, rows, batch_size
        self._tokenise = _tokeniser(task, features)
        self._threads = ThreadPoolExecutor(_THREADS, "examples")
        self._ahead: collections.deque[tuple[np.ndarray, Place, Future]] = collections.deque()
        self.move_to(row_order.start)

    def position(self) -> Place:
        """The place of the next batch; what has only been read ahead doesn't count."""
        return dict(self._place)

    def move_to(self, position: Place) -> None:
        """Goes to a place that `position` returned for the same examples and order of rows.

        Raises:
          InputError: there is no such place.
        """
        self._order.check(position)
        for *_, examples in self._ahead:
            examples.cancel()
        self._ahead.clear()
        self._place, self._place_ahead = dict(position), dict(position)

    def next_batch(self) -> tuple[Int[np.ndarray, "R E"], Arrays]:
        """Example ids of the next batch's rows, and the examples, row after row.

        Raises:
          InputError: a record is damaged.
          StopIteration: there are no more batches.
        """
        while len(self._ahead) < _BATCHES_AHEAD:
            ids, self._place_ahead = self._order.take(self._place_ahead, self._batch_size)
            if not len(ids):
                break
            grid = np.full((len(self._rows), ids.shape[1]), ABSENT)
            filled = self._rows < len(ids)
            grid[filled] = ids[self._rows[filled]]
            examples = self._threads.submit(self._load, grid)
            self._ahead.append((grid, self._place_ahead, examples))
        if not self._ahead:
            raise StopIteration
        grid, place, examples = self._ahead.popleft()
        loaded = examples.result()
        self._place = place
        return grid, loaded

    def _load(self, grid: np.ndarray) -> Arrays:
        records = self._files.read(grid[grid != ABSENT])
        if not records:  # the last batch may hold nothing for this process
            specs = self._tokenise.get_concrete_function().structured_outputs
            return {
                name: np.zeros([0] * len(spec.shape), spec.dtype.as_numpy_dtype)
                for name, spec in specs.items()
            }
        return {name: values.numpy() for name, values in self._tokenise(records).items()}


def _tokeniser(task: seqio.Task, features: Mapping[str, Any]):
    """A compiled function: k records → their features, `rows.NOTHING` behind what is shorter."""

    @tf.function(input_signature=[tf.TensorSpec([None], tf.string)])
    def tokenise(records):
        examples = tf.data.Dataset.from_tensor_slices(records).map(
            lambda record: tf.io.parse_single_example(record, features), num_parallel_calls=8
        )
        examples = task.preprocess_postcache(task.preprocess_precache(examples), None)
        padding = {
            name: tf.constant("" if spec.dtype == tf.string else NOTHING, spec.dtype)
            for name, spec in examples.element_spec.items()
        }
        size = tf.size(records, out_type=tf.int64)
        options = tf.data.Options()
        options.autotune.enabled = False  # a call is over before there is anything to learn
        whole = examples.padded_batch(size, padding_values=padding).with_options(options)
        batch = whole.get_single_element()
        return {name: batch[name] for name in features}  # not the texts

    return tokenise

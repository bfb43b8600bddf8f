"""The examples of batch after batch, read at random and tokenised ahead by tf.data."""

import collections
import dataclasses
import os
from collections.abc import Iterator

import numpy as np
import seqio
import tensorflow as tf
from jaxtyping import Int

from recexplore.errors import InputError
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
_CHUNK = 64  # examples that leave TensorFlow together, whatever the batches
_CHUNKS_AHEAD = 4
_MAX_THREADS = 16
Arrays = dict[str, np.ndarray]


@dataclasses.dataclass
class _Pass:
    """One way through the data, from a place on.

    Attributes:
      place: of the next batch to be read.
      batches: those read but not handed out yet: example ids [R, E], and the place after them.
      chunks: tokenised examples not handed out yet.
      failure: why reading ended early.
    """

    place: Place
    batches: collections.deque = dataclasses.field(default_factory=collections.deque)
    chunks: collections.deque = dataclasses.field(default_factory=collections.deque)
    failure: InputError | None = None


class ExampleStream:
    """Hands out the examples of this process's rows, batch after batch.

    A thread of tf.data runs through the order of rows, some batches ahead, and reads; the task's
    own preprocessors tokenise. What comes out of TensorFlow are examples in one line, from which
    batches, of changing numbers of examples, are cut here.

    Args:
      task: its preprocessors turn one example into one, always the same.
      files: the examples.
      row_order: which of them a row holds.
      rows: which of a batch's rows this process wants.
      batch_size: B.
    """

    def __init__(
        self,
        task: seqio.Task,
        files: ExampleFiles,
        row_order: RowOrder,
        rows: Int[np.ndarray, "R"],
        batch_size: int,
    ):
        self._files, self._order, self._rows, self._batch_size = files, row_order, rows, batch_size
        records = tf.data.Dataset.from_generator(
            self._read, output_signature=tf.TensorSpec([None], tf.string)
        )
        features = PAIR_FEATURES if files.pairs else FEATURES
        examples = records.unbatch().map(
            lambda record: tf.io.parse_single_example(record, features),
            num_parallel_calls=2,
        )
        examples = task.preprocess_postcache(task.preprocess_precache(examples), None)
        padding = {
            name: tf.constant("" if spec.dtype == tf.string else NOTHING, spec.dtype)
            for name, spec in examples.element_spec.items()
        }
        chunks = examples.padded_batch(_CHUNK, padding_values=padding)
        # What else the preprocessors leave, such as the texts, is not for models.
        chunks = chunks.map(lambda chunk: {name: chunk[name] for name in features})
        options = tf.data.Options()
        options.threading.private_threadpool_size = min(os.cpu_count() or 1, _MAX_THREADS)
        self._dataset = chunks.prefetch(_CHUNKS_AHEAD).with_options(options)
        self._nothing = {
            name: np.zeros([0] * len(spec.shape), spec.dtype.as_numpy_dtype)
            for name, spec in self._dataset.element_spec.items()
        }

    def move_to(self, place: Place) -> None:
        """Begins anew, with the batch at a place."""
        self._pass = _Pass(place)
        self._chunks = iter(self._dataset)

    def next_batch(self) -> tuple[Int[np.ndarray, "R E"], Place, Arrays]:
        """Example ids of the rows, the place after the batch, and the examples, row after row.

        Raises:
          InputError: a record is damaged.
          StopIteration: there are no more batches.
        """
        current = self._pass
        while not current.batches or _count(current.chunks) < np.sum(
            current.batches[0][0] != ABSENT
        ):
            chunk = self._pull()
            if chunk is None:
                break
            current.chunks.append(chunk)
        if not current.batches:
            raise StopIteration
        grid, place = current.batches.popleft()
        count = int(np.sum(grid != ABSENT))
        if count > _count(current.chunks):
            raise ValueError("The task's preprocessors must turn one example into one.")
        return grid, place, self._take(count)

    def _read(self) -> Iterator[np.ndarray]:
        """The records of batch after batch; tf.data calls this in a thread of its own."""
        current = self._pass
        try:
            while True:
                ids, current.place = self._order.take(current.place, self._batch_size)
                if not len(ids):
                    return
                grid = np.full((len(self._rows), ids.shape[1]), ABSENT)
                filled = self._rows < len(ids)
                grid[filled] = ids[self._rows[filled]]
                records = self._files.read(grid[grid != ABSENT])
                current.batches.append((grid, current.place))
                if records:
                    yield np.array(records, object)
        except InputError as error:
            current.failure = error

    def _pull(self) -> Arrays | None:
        chunk = next(self._chunks, None)
        if chunk is None:
            if self._pass.failure is not None:
                raise self._pass.failure
            return None
        return {name: values.numpy() for name, values in chunk.items()}

    def _take(self, count: int) -> Arrays:
        """The next examples, as one."""
        parts, chunks = [self._nothing], self._pass.chunks
        while count:
            chunk = chunks.popleft()
            size = len(chunk["example_id"])
            parts.append({name: values[:count] for name, values in chunk.items()})
            if size > count:
                chunks.appendleft({name: values[count:] for name, values in chunk.items()})
            count -= min(size, count)
        return {name: _joined([part[name] for part in parts]) for name in self._nothing}


def _count(chunks: collections.deque) -> int:
    return sum(len(chunk["example_id"]) for chunk in chunks)


def _joined(parts: list[np.ndarray]) -> np.ndarray:
    if parts[0].ndim == 1:
        return np.concatenate(parts)
    width = max(part.shape[1] for part in parts)
    padded = [
        np.pad(part, [(0, 0), (0, width - part.shape[1])], constant_values=NOTHING)
        for part in parts
    ]
    return np.concatenate(padded)

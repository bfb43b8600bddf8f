"""SeqIO tasks over TFRecord shards, and the batches that the models train on.

Imported, with seqio_vocabulary, only where SeqIO is needed: TensorFlow comes with it.
"""

import functools
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import seqio
import tensorflow as tf
from jaxtyping import Int

from recexplore.errors import InputError
from recexplore.tasks import example_files, order
from recexplore.tasks.example_files import NUM_SHARDS, ExampleFiles
from recexplore.tasks.example_stream import FEATURES, PAIR_FEATURES, ExampleStream
from recexplore.tasks.examples import Example
from recexplore.tasks.rows import NOTHING, Shape, packed_rows, single_rows
from recexplore.tasks.seqio_vocabulary import description_tokens, prompt_tokens
from recexplore.tasks.vocabulary import Vocabulary

Rows = Sequence[int] | Int[np.ndarray, "R"]


def write_examples(
    examples: Sequence[Example], folder: Path, split: str, vocabulary: Vocabulary
) -> None:
    """Writes examples as TFRecord shards `split-00000-of-00016.tfrecord`, dealt out in turn.

    Beside them goes `split.index.npy`: for every example its place and its length in tokens, so
    that it can be read by itself.

    Args:
      examples: all of them pairs, or none.
      folder: made if it isn't there.
      split: train or validation.
      vocabulary: counts the tokens.
    """
    if len({bool(example.rejected) for example in examples}) > 1:
        raise ValueError("Some examples have a worse description and some have none.")
    folder.mkdir(parents=True, exist_ok=True)
    records = [_as_proto(example, index) for index, example in enumerate(examples)]
    example_files.write_records(folder, split, records, tf.io.TFRecordWriter)
    index = example_files.entries(records)
    # There are few different descriptions, each in many examples.
    texts = {text for example in examples for text in (example.targets, example.rejected)}
    counts = {text: len(vocabulary.encode_description(text)) for text in texts - {""}}
    index["inputs"] = [len(vocabulary.encode_prompt(example.inputs)) for example in examples]
    index["targets"] = [counts[example.targets] for example in examples]
    index["rejected"] = [counts.get(example.rejected, 0) for example in examples]
    example_files.write_index(folder, split, index)


def _as_proto(example: Example, index: int) -> bytes:
    def text(value: str) -> tf.train.Feature:
        return tf.train.Feature(bytes_list=tf.train.BytesList(value=[value.encode()]))

    def numbers(values: Sequence[int]) -> tf.train.Feature:
        return tf.train.Feature(int64_list=tf.train.Int64List(value=values))

    def number(value: float) -> tf.train.Feature:
        return tf.train.Feature(float_list=tf.train.FloatList(value=[value]))

    features = {
        "inputs": text(example.inputs),
        "targets": text(example.targets),
        "seen": numbers(example.seen),
        "label": number(example.label),
        "weight": number(example.weight),
        "example_id": numbers([index]),
    }
    if example.rejected:
        features["rejected"] = text(example.rejected)
    proto = tf.train.Example(features=tf.train.Features(feature=features))
    return proto.SerializeToString(deterministic=True)


def make_task(name: str, folder: Path, vocabulary: Vocabulary) -> seqio.Task:
    """A SeqIO task over shards written by `write_examples`.

    Its features are `inputs` and `targets`, and `rejected` where the examples are pairs.

    Args:
      name: of the task.
      folder: where its shards are.
      vocabulary: tokenizes prompts and descriptions.
    """
    shards = {
        split: os.fspath(folder / f"{split}-*-of-{NUM_SHARDS:05d}.tfrecord")
        for split in ("train", "validation")
    }
    pairs = example_files.has_pairs(folder)
    answers = description_tokens(vocabulary)
    worse = {"rejected": seqio.Feature(answers, add_eos=True)} if pairs else {}
    return seqio.Task(
        name,
        source=seqio.TFExampleDataSource(shards, PAIR_FEATURES if pairs else FEATURES),
        preprocessors=[seqio.preprocessors.tokenize, seqio.preprocessors.append_eos],
        output_features={
            "inputs": seqio.Feature(prompt_tokens(vocabulary), add_eos=False),
            "targets": seqio.Feature(answers, add_eos=True),
            **worse,
        },
        shuffle_buffer_size=16_384,
    )


class Data:
    """The training and the validation batches of one task, for a trainer.

    Args:
      task: from `make_task`.
      folder: where its examples are.
      seed: of the training examples' order.
      batch_size: B, of all processes together.
      **shapes: further arguments of `Batches`, for both splits.

    Raises:
      InputError: a split has no examples, the training split too few for a batch; or see `Batches`.
    """

    def __init__(
        self, task: seqio.Task, folder: Path, *, seed: int, batch_size: int, **shapes: Any
    ):
        self.batch_size = batch_size
        self._seed = seed
        self._make = functools.partial(Batches, task, folder, batch_size=batch_size, **shapes)
        count_examples(folder, "validation")
        self._make("train", [0], shuffle=True, seed=seed).check_first_is_full()

    def training(self, rows: Rows) -> "Batches":
        """Some rows of endless training batches."""
        return self._make("train", rows, shuffle=True, seed=self._seed, repeat=True)

    def validation(self, rows: Rows) -> "KeptBatches":
        """Some rows of the validation split's batches, to be gone through many times."""
        return KeptBatches(self._make("validation", rows))


class KeptBatches(Sequence):
    """Batches that were read once and are kept, but for their masks of seen clusters.

    Those would be many times larger than all else: a gigabyte for a million examples and a thousand
    clusters. Only which clusters they name is kept, and the mask of a batch is made when it's asked
    for.

    Args:
      batches: some, each with `seen`.
    """

    def __init__(self, batches: Iterable[dict[str, np.ndarray]]):
        self._kept = []
        for batch in batches:
            seen = batch["seen"]
            self._kept.append({**batch, "seen": (seen.shape, np.flatnonzero(seen))})

    def __len__(self) -> int:
        return len(self._kept)

    def __getitem__(self, place: int) -> dict[str, np.ndarray]:
        kept = self._kept[place]
        shape, named = kept["seen"]
        seen = np.zeros(shape, bool)
        seen.flat[named] = True
        return {**kept, "seen": seen}


def count_examples(folder: Path, split: str) -> int:
    """Number of examples in a split.

    Raises:
      InputError: there are none, or their files are damaged.
    """
    return len(ExampleFiles(folder, split))


class Batches:
    """An endless (or, unrepeated, finite) iterator of model batches that knows its place.

    A batch is a dict of numpy arrays: see `rows.single_rows` or, packed, `rows.packed_rows`. What
    the B rows of a batch hold is a function of the seed and the batch's place alone, so that any
    number of processes, each asking for rows of its own, share the same batches. A last batch that
    is not full is filled with examples of weight 0.

    Args:
      task: from `make_task`. Its preprocessors must turn one example into one, always the same.
      folder: where its examples are.
      split: train or validation.
      rows: which of a batch's B rows this process wants; None: all.
      batch_size: B, of all processes together.
      max_length: T.
      longest_description: in tokens, EOS included. A prompt that leaves less room than this loses
        its oldest tokens after the prefix, whichever description follows: as when the model is
        asked.
      prefix_length: tokens that all prompts begin with.
      num_clusters: M.
      shuffle: in an order drawn from `seed`; otherwise in the order of the examples.
      seed: of the order.
      repeat: start over at the end, in another order.
      pack: several examples a row.
      examples_per_row: E, at most, when packed.

    Raises:
      InputError: there are no examples, their files are damaged, the longest description leaves no
        room for a prompt, or pairs are to be packed.
      ValueError: `rows` names none, or one outside 0..B−1.
    """

    def __init__(
        self,
        task: seqio.Task,
        folder: Path,
        split: str,
        rows: Rows | None = None,
        *,
        batch_size: int,
        max_length: int,
        longest_description: int,
        prefix_length: int,
        num_clusters: int,
        shuffle: bool = False,
        seed: int = 0,
        repeat: bool = False,
        pack: bool = False,
        examples_per_row: int = 8,
    ):
        room = max_length - longest_description
        if room <= prefix_length:
            raise InputError(
                f"pipeline.train.max_length is {max_length}, but the longest description alone has "
                f"{longest_description} tokens and what all prompts begin with {prefix_length}. "
                "Leave it unbound, or bind more."
            )
        wanted = np.arange(batch_size) if rows is None else np.array(rows, np.int64)
        if not len(wanted) or wanted.min() < 0 or wanted.max() >= batch_size:
            raise ValueError(f"Rows {wanted.tolist()} of a batch of {batch_size}.")
        self._files = ExampleFiles(folder, split)
        if pack and self._files.pairs:
            raise InputError(
                f"pipeline.train.pack is True, but the examples in {folder} are pairs, which can't "
                "be packed. Bind it to False for this model."
            )
        self._folder, self._batch_size = folder, batch_size
        self._shape = Shape(max_length, room, prefix_length, num_clusters)
        examples = order.ExampleOrder(len(self._files), seed if shuffle else None)
        if pack:
            self._order = order.PackedRows(
                examples, self._lengths, max_length, examples_per_row, repeat=repeat
            )
        else:
            self._order = order.SingleRows(examples, repeat=repeat)
        self._lay_out = packed_rows if pack else single_rows
        features = PAIR_FEATURES if self._files.pairs else FEATURES
        self._stream = ExampleStream(task, features, self._files, self._order, wanted, batch_size)

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        grid, examples = self._stream.next_batch()
        self._check(grid[grid != order.ABSENT], examples)
        return self._lay_out(examples, grid, self._shape)

    def restart(self) -> None:
        """Goes back to the first batch."""
        self.move_to(self._order.start)

    def position(self) -> dict[str, int]:
        """The place of the next batch; what has only been read ahead doesn't count."""
        return self._stream.position()

    def move_to(self, position: dict[str, int]) -> None:
        """Goes to a place that `position` returned for the same examples and settings.

        The rows, and with them the number of processes, may be others.

        Raises:
          InputError: there is no such place.
        """
        self._stream.move_to(position)

    def check_first_is_full(self) -> None:
        """Checks that the first batch is full, where epochs aren't repeated.

        Raises:
          InputError: there are too few examples.
        """
        rows, _ = self._order.take(self._order.start, self._batch_size)
        if len(rows) < self._batch_size:
            packed = f", which fill {len(rows):,} rows" if self._lay_out is packed_rows else ""
            raise InputError(
                f"pipeline.train.batch_size is {self._batch_size}, but {self._folder} has "
                f"{len(self._files):,} training examples{packed}. No example may be in a batch "
                f"twice: bind {len(rows)} at most."
            )

    def _lengths(self, ids: Int[np.ndarray, "P"]) -> Int[np.ndarray, "P"]:
        """Tokens of prompt and description, of pairs the longer one."""
        counts = self._files.token_counts(ids)
        prompts = np.minimum(counts["inputs"], self._shape.room)
        descriptions = np.maximum(counts["targets"], counts["rejected"])
        if np.max(prompts + descriptions, initial=0) > self._shape.max_length:
            raise self._foreign("a description is longer than the longest of the clusters")
        return prompts + descriptions

    def _check(self, ids: np.ndarray, examples: dict[str, np.ndarray]) -> None:
        """What came out of the task is what the index promised, and fits."""
        same = np.array_equal(examples["example_id"], ids)
        for name, counted in self._files.token_counts(ids).items():
            found = np.sum(examples[name] != NOTHING, axis=1) if name in examples else 0
            same &= np.array_equal(np.broadcast_to(found, counted.shape), counted)
        if not same:
            raise self._foreign("their tokens are not those that were counted")
        self._lengths(ids)
        if examples["seen"].max(initial=0) >= self._shape.num_clusters:
            raise self._foreign("they name clusters that there are not")

    def _foreign(self, why: str) -> InputError:
        return InputError(
            f"The examples in {self._folder} were written with another vocabulary or other "
            f"clusters ({why}). Run `recexplore tokenize` again."
        )

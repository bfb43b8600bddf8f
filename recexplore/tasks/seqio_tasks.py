"""SeqIO tasks over TFRecord shards, and the batches that the models train on.

Imported, with seqio_vocabulary, only where SeqIO is needed: TensorFlow comes with it.
"""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import seqio
import tensorflow as tf

from recexplore.errors import InputError
from recexplore.tasks.examples import Example
from recexplore.tasks.seqio_vocabulary import description_tokens, prompt_tokens
from recexplore.tasks.vocabulary import Vocabulary

NUM_SHARDS = 16  # more than hosts are likely to be, so that each reads shards of its own
_FEATURES = {
    "inputs": tf.io.FixedLenFeature([], tf.string),
    "targets": tf.io.FixedLenFeature([], tf.string),
    "seen": tf.io.RaggedFeature(tf.int64),
    "label": tf.io.FixedLenFeature([], tf.float32),
    "weight": tf.io.FixedLenFeature([], tf.float32),
    "example_id": tf.io.FixedLenFeature([], tf.int64),
}


def write_examples(examples: Sequence[Example], folder: Path, split: str) -> None:
    """Writes examples as TFRecord shards `split-00000-of-00016.tfrecord`, dealt out in turn."""
    folder.mkdir(parents=True, exist_ok=True)
    for shard in range(NUM_SHARDS):
        path = folder / f"{split}-{shard:05d}-of-{NUM_SHARDS:05d}.tfrecord"
        with tf.io.TFRecordWriter(os.fspath(path)) as writer:
            for index in range(shard, len(examples), NUM_SHARDS):
                writer.write(_as_proto(examples[index], index))


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
    proto = tf.train.Example(features=tf.train.Features(feature=features))
    return proto.SerializeToString(deterministic=True)


def make_task(name: str, folder: Path, vocabulary: Vocabulary) -> seqio.Task:
    """A SeqIO task over shards written by `write_examples`.

    Args:
      name: of the task.
      folder: where its shards are.
      vocabulary: tokenizes prompts and descriptions.
    """
    shards = {
        split: os.fspath(folder / f"{split}-*-of-{NUM_SHARDS:05d}.tfrecord")
        for split in ("train", "validation")
    }
    return seqio.Task(
        name,
        source=seqio.TFExampleDataSource(shards, _FEATURES),
        preprocessors=[seqio.preprocessors.tokenize, seqio.preprocessors.append_eos],
        output_features={
            "inputs": seqio.Feature(prompt_tokens(vocabulary), add_eos=False),
            "targets": seqio.Feature(description_tokens(vocabulary), add_eos=True),
        },
        shuffle_buffer_size=16_384,
    )


class Batches:
    """An endless (or, unrepeated, finite) iterator of model batches that knows its position.

    A batch is a dict of numpy arrays: `tokens` int32 [B, T], prompt, description and EOS,
    right-padded; `prompt_lengths` and `lengths` int32 [B], which all masks come from; `seen` bool
    [B, M]; `label` and `weight` float32 [B]; `example_id` int64 [B]. A last batch that is not full
    is filled with examples of weight 0.

    Args:
      task: from `make_task`.
      split: train or validation.
      batch_size: B of this process.
      max_length: T.
      longest_description: in tokens, EOS included. A prompt that leaves less room than this loses
        its oldest tokens after the prefix, whichever description follows: as when the model is
        asked.
      prefix_length: tokens that all prompts begin with.
      num_clusters: M.
      shuffle: in an order drawn from `seed`; otherwise in the order of the files.
      seed: of the order.
      repeat: start over at the end, in another order.
      shard: index of this process and number of processes.

    Raises:
      InputError: the longest description leaves no room for a prompt.
    """

    def __init__(
        self,
        task: seqio.Task,
        split: str,
        *,
        batch_size: int,
        max_length: int,
        longest_description: int,
        prefix_length: int,
        num_clusters: int,
        shuffle: bool = False,
        seed: int = 0,
        repeat: bool = False,
        shard: tuple[int, int] = (0, 1),
    ):
        room = max_length - longest_description
        if room <= prefix_length:
            raise InputError(
                f"pipeline.train.max_length is {max_length}, but the longest description alone has "
                f"{longest_description} tokens and what all prompts begin with {prefix_length}. "
                "Leave it unbound, or bind more."
            )
        dataset = task.get_dataset(
            sequence_length=None,
            split=split,
            shuffle=shuffle,
            seed=seed,
            num_epochs=None if repeat else 1,
            shard_info=seqio.ShardInfo(index=shard[0], num_shards=shard[1]),
            trim_output_features=False,
            try_in_mem_cache=False,  # a cache's place can't be saved
        )

        def convert(example):
            return _to_model_features(example, max_length, room, prefix_length, num_clusters)

        dataset = dataset.map(convert, num_parallel_calls=2, deterministic=True)
        if not repeat:
            padding = tf.data.Dataset.from_tensors(_padding(dataset.element_spec))
            rest = -sum(1 for _ in dataset) % batch_size
            dataset = dataset.concatenate(padding.repeat(rest))
        self._dataset = dataset.batch(batch_size, drop_remainder=True).prefetch(4)
        self._iterator = iter(self._dataset)

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        return {name: value.numpy() for name, value in next(self._iterator).items()}

    def restart(self) -> None:
        """Goes back to the first batch."""
        self._iterator = iter(self._dataset)

    def position(self) -> np.ndarray:
        """The exact position, shuffle buffers included, as bytes (uint8)."""
        with TemporaryDirectory() as folder:
            prefix = os.path.join(folder, "position")
            tf.train.Checkpoint(iterator=self._iterator).write(prefix)
            names = sorted(os.listdir(folder))
            contents = [Path(folder, name).read_bytes() for name in names]
        packed = tf.io.serialize_tensor(
            tf.constant([part for pair in zip(names, contents, strict=True) for part in pair])
        )
        return np.frombuffer(packed.numpy(), np.uint8)

    def move_to(self, position: np.ndarray) -> None:
        """Goes to a position that `position` returned for the same task and settings."""
        parts = tf.io.parse_tensor(position.tobytes(), tf.string).numpy()
        with TemporaryDirectory() as folder:
            for name, content in zip(parts[::2], parts[1::2], strict=True):
                Path(folder, name.decode()).write_bytes(content)
            prefix = os.path.join(folder, "position")
            checkpoint = tf.train.Checkpoint(iterator=self._iterator)
            checkpoint.read(prefix).assert_consumed()


def count_examples(folder: Path, split: str) -> int:
    """Number of examples in a split's shards.

    Raises:
      InputError: there are none.
    """
    files = sorted(map(os.fspath, folder.glob(f"{split}-*.tfrecord")))
    count = sum(1 for _ in tf.data.TFRecordDataset(files)) if files else 0
    if not count:
        raise InputError(
            f"{folder} holds no {split} examples. The log has no novel transition in that period: "
            "check transitions.split_times and the look-back window."
        )
    return count


def _to_model_features(example, max_length: int, room: int, prefix_length: int, num_clusters: int):
    targets = tf.cast(example["targets"], tf.int32)
    inputs = tf.cast(example["inputs"], tf.int32)
    rest = inputs[prefix_length:]
    rest = rest[tf.maximum(tf.shape(inputs)[0] - room, 0) :]
    inputs = tf.concat([inputs[:prefix_length], rest], axis=0)
    tokens = tf.concat([inputs, targets], axis=0)
    length = tf.shape(tokens)[0]
    tokens = tf.pad(tokens, [[0, max_length - length]])
    tokens.set_shape([max_length])
    seen = tf.reduce_any(
        tf.one_hot(example["seen"], num_clusters, on_value=True, off_value=False), axis=0
    )
    seen.set_shape([num_clusters])
    return {
        "tokens": tokens,
        "prompt_lengths": tf.shape(inputs)[0],
        "lengths": length,
        "seen": seen,
        "label": example["label"],
        "weight": example["weight"],
        "example_id": example["example_id"],
    }


def _padding(spec):
    """An example of weight 0 that every computation can swallow."""
    ones = ("prompt_lengths", "lengths")
    return {
        name: (tf.ones if name in ones else tf.zeros)(feature.shape, feature.dtype)
        for name, feature in spec.items()
    }

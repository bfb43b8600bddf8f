"""What `recexplore tokenize` wrote, for T5X's jobs: tasks, vocabularies, batches, a network.

These functions are there to be bound by gin, see gin_configs/t5x/. A work directory has examples
of several models; `work` and `model` say which are meant. A T5X job gets its MIXTURE_OR_TASK_NAME
from `task`, which registers the task, so that no MIXTURE_OR_TASK_MODULE has to.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import seqio
import tensorflow as tf
from clu.data import dataset_iterator
from etils import epath

from recexplore import artifacts, explorer, pipeline
from recexplore.adapters import t5x_checkpoints
from recexplore.errors import InputError
from recexplore.interests.cluster_table import ClusterTable
from recexplore.models.config_file import embedding_rows
from recexplore.models.trie import Trie, trie_fingerprint
from recexplore.tasks import seqio_tasks
from recexplore.tasks.seqio_vocabulary import Tokens, description_tokens, prompt_tokens
from recexplore.tasks.vocabulary import Vocabulary

_FOR_PEOPLE = "example_id"  # 64 bits wide, and no model reads it


def task(work: str, model: str) -> str:
    """Registers a model's examples as a SeqIO task and returns its name, `recexplore_<model>`.

    Args:
      work: the work directory.
      model: novelty, alignment, …

    Raises:
      InputError: there are no such examples.
    """
    name = f"recexplore_{model}"
    made = seqio_tasks.make_task(name, _examples(work, model), _vocabulary(work))
    seqio.TaskRegistry.remove(name)  # of another work directory
    seqio.TaskRegistry.add_provider(name, made)
    return name


def feature_lengths(work: str, model: str) -> dict[str, int]:
    """TASK_FEATURE_LENGTHS in which every example has room: T5X would cut off a prompt's end."""
    longest = longest_example(work, model)
    targets = trie(work).max_length
    return {"inputs": longest - targets, "targets": targets}


def longest_example(work: str, model: str) -> int:
    """Tokens of the longest prompt and description together."""
    _examples(work, model)
    lengths = Path(work) / pipeline.EXAMPLES / pipeline.MAX_LENGTHS
    return artifacts.read_json(lengths)[model]


def prompt_vocabulary(work: str) -> Tokens:
    """What tokenizes prompts, the feature `inputs`."""
    return prompt_tokens(_vocabulary(work))


def description_vocabulary(work: str) -> Tokens:
    """What tokenizes descriptions, the feature `targets`."""
    return description_tokens(_vocabulary(work))


def trie(work: str) -> Trie:
    """The descriptions of all clusters."""
    descriptions = ClusterTable.read(Path(work) / pipeline.CLUSTERS).descriptions
    return explorer.description_trie(_vocabulary(work), descriptions)


def network(
    work: str,
    model: str,
    make_network: Callable[[Any], Any],
    make_config: Callable[..., Any],
    max_length: int | None = None,
    pretrained: str | None = None,
) -> Any:
    """The network that `recexplore train` would make for these examples.

    Args:
      work: the work directory.
      model: novelty, alignment, …
      make_network: Transformer or RewardModel.
      make_config: TransformerConfig, all but its vocab_size and max_length bound.
      max_length: tokens of a row; None: of the longest example.
      pretrained: the folder that `pipeline.train.pretrained` names, whose embedding may have more
        rows than the vocabulary.
    """
    rows = embedding_rows(pretrained) if pretrained else _vocabulary(work).embedding_rows
    longest = max_length or longest_example(work, model)
    return make_network(make_config(vocab_size=rows, max_length=longest))


class ExampleConverter(seqio.FeatureConverter):
    """A task's examples as T5X has them for decoders, with what our objectives need besides.

    For a prompt 9 4 6 and a description 3 1, in 4 + 3 tokens:

        decoder_target_tokens     9 4 6 3 1 0 0
        decoder_input_tokens      0 9 4 6 3 1 0
        decoder_causal_attention  1 1 1 1 0 0 0
        decoder_loss_weights      0 0 0 1 1 0 0

    which is what seqio.DecoderFeatureConverter gives; and `seen` bool [M], `label` and `weight`. An
    example that lacks these has seen nothing, the label 0 and the weight 1.

    Args:
      num_clusters: M.
      pack: must be False.
      use_custom_packing_ops: has no meaning then.

    Raises:
      InputError: examples are to be packed.
    """

    TASK_FEATURES = {
        "inputs": seqio.FeatureConverter.FeatureSpec(dtype=tf.int32),
        "targets": seqio.FeatureConverter.FeatureSpec(dtype=tf.int32),
    }
    _TOKENS = seqio.FeatureConverter.FeatureSpec(dtype=tf.int32)
    MODEL_FEATURES = {
        "decoder_target_tokens": _TOKENS,
        "decoder_input_tokens": _TOKENS,
        "decoder_causal_attention": _TOKENS,
        "decoder_loss_weights": _TOKENS,
        "seen": seqio.FeatureConverter.FeatureSpec(dtype=tf.bool),
        "label": seqio.FeatureConverter.FeatureSpec(dtype=tf.float32, rank=0),
        "weight": seqio.FeatureConverter.FeatureSpec(dtype=tf.float32, rank=0),
    }
    PACKING_FEATURE_DTYPES = {}

    def __init__(self, num_clusters: int, pack: bool = False, use_custom_packing_ops: bool = False):
        if pack:
            raise InputError(
                "utils.DatasetConfig.pack is True, but SeqIO can't pack recexplore's examples. "
                "Bind it to False; train_script.train.get_dataset_fn = @t5x_data.get_dataset packs "
                "training examples in recexplore's own way."
            )
        super().__init__(pack=False, use_custom_packing_ops=use_custom_packing_ops)
        self._num_clusters = num_clusters

    def get_model_feature_lengths(self, task_feature_lengths: Mapping[str, int]) -> dict[str, int]:
        """The lengths of MODEL_FEATURES."""
        total = task_feature_lengths["inputs"] + task_feature_lengths["targets"]
        lengths = dict.fromkeys(self.MODEL_FEATURES, total)
        return {**lengths, "seen": self._num_clusters, "label": 1, "weight": 1}

    def _convert_features(
        self, ds: tf.data.Dataset, task_feature_lengths: Mapping[str, int]
    ) -> tf.data.Dataset:
        length = task_feature_lengths["inputs"] + task_feature_lengths["targets"]
        return ds.map(lambda example: self._converted(example, length), tf.data.AUTOTUNE)

    def _converted(self, example: Mapping[str, Any], length: int) -> dict[str, Any]:
        prompt = tf.size(example["inputs"])
        real = prompt + tf.size(example["targets"])
        tokens = tf.concat([example["inputs"], example["targets"]], axis=0)
        tokens = tf.ensure_shape(tf.pad(tokens, [[0, length - real]]), [length])
        place = tf.range(length)
        seen = tf.cast(example.get("seen", tf.zeros([0], tf.int64)), tf.int32)
        named = tf.scatter_nd(seen[:, None], tf.ones_like(seen), [self._num_clusters])
        return {
            "decoder_target_tokens": tokens,
            "decoder_input_tokens": tf.concat([[0], tokens[:-1]], axis=0),
            "decoder_causal_attention": tf.cast(place <= prompt, tf.int32),
            "decoder_loss_weights": tf.cast((place >= prompt) & (place < real), tf.int32),
            "seen": named > 0,
            "label": example.get("label", tf.constant(0.0)),
            "weight": example.get("weight", tf.constant(1.0)),
        }


def get_dataset(
    cfg: Any,
    shard_id: int,
    num_shards: int,
    feature_converter_cls: Any = None,
    num_epochs: int | None = None,
    continue_from_last_checkpoint: bool = False,
    *,
    work: str,
    model: str,
    examples_per_row: int = 8,
) -> "Rows":
    """The batches that `recexplore train` trains on, for `t5x.train`'s `get_dataset_fn`.

    Their order is a function of the seed. Where the dataset's place is saved
    (utils.SaveCheckpointConfig.save_dataset), a run that was stopped goes on with the next batch.

    Args:
      cfg: T5X's DatasetConfig, of which split, batch_size, seed, shuffle, pack and the sum of
        task_feature_lengths count.
      shard_id: of this host's rows.
      num_shards: how many hosts share a batch.
      feature_converter_cls: has no use here.
      num_epochs: must be None, for ever.
      continue_from_last_checkpoint: has no use here.
      work: the work directory.
      model: novelty, alignment, …
      examples_per_row: at most, when packed.

    Raises:
      InputError: there is no seed, or see `seqio_tasks.Batches`.
    """
    del feature_converter_cls, continue_from_last_checkpoint
    if cfg.seed is None or num_epochs is not None:
        raise InputError(
            "t5x_data.get_dataset is for endless training with a seed: bind "
            "train/utils.DatasetConfig.seed to a whole number."
        )
    descriptions, vocabulary = trie(work), _vocabulary(work)
    rows = cfg.batch_size // num_shards
    batches = seqio_tasks.Batches(
        seqio_tasks.make_task(f"recexplore_{model}", _examples(work, model), vocabulary),
        _examples(work, model),
        cfg.split,
        np.arange(shard_id * rows, (shard_id + 1) * rows),
        batch_size=cfg.batch_size,
        max_length=sum(cfg.task_feature_lengths.values()),
        longest_description=descriptions.max_length,
        prefix_length=len(vocabulary.prefix),
        num_clusters=descriptions.num_sequences,
        shuffle=cfg.shuffle,
        seed=cfg.seed,
        repeat=True,
        pack=cfg.pack,
        examples_per_row=examples_per_row,
    )
    return Rows(batches, trie_fingerprint(descriptions))


class Rows(dataset_iterator.DatasetIterator):
    """`seqio_tasks.Batches` as an iterator that T5X saves and restores.

    Args:
      batches: the rows of this host.
      clusters: the fingerprint of the descriptions, saved with the place.
    """

    def __init__(self, batches: seqio_tasks.Batches, clusters: str):
        self._batches, self._clusters = batches, clusters
        first = next(self)
        batches.restart()
        self._spec = {
            name: dataset_iterator.ArraySpec(rows.dtype, rows.shape) for name, rows in first.items()
        }

    def __next__(self) -> dict[str, np.ndarray]:
        batch = next(self._batches)
        return {name: rows for name, rows in batch.items() if name != _FOR_PEOPLE}

    def reset(self) -> None:
        """Goes back to the first batch."""
        self._batches.restart()

    @property
    def element_spec(self) -> dict[str, dataset_iterator.ArraySpec]:
        """Types and shapes of this host's rows."""
        return self._spec

    def save(self, filename: Any) -> None:
        """Writes the place of the next batch."""
        place = {**self._batches.position(), t5x_checkpoints.CLUSTERS: self._clusters}
        epath.Path(filename).write_text(json.dumps(place))

    def restore(self, filename: Any) -> None:
        """Goes to a place that was written.

        Raises:
          InputError: for other clusters or another vocabulary.
        """
        place = json.loads(epath.Path(filename).read_text())
        if place.pop(t5x_checkpoints.CLUSTERS, self._clusters) != self._clusters:
            raise InputError(
                f"{filename} is of a training on other clusters, or with another vocabulary, than "
                "WORKDIR has: token ids mean something else. Set another MODEL_DIR or "
                "INITIAL_CHECKPOINT_PATH, or the WORKDIR of that training."
            )
        self._batches.move_to(place)


def _examples(work: str, model: str) -> Path:
    folder = Path(work) / pipeline.EXAMPLES
    if not (folder / model).is_dir():
        there = sorted(path.name for path in folder.glob("*") if path.is_dir())
        raise InputError(
            f"{folder} has no examples of a model {model!r}; "
            f"{'there are: ' + ', '.join(there) if there else 'it has none at all'}. Set WORKDIR "
            "to a work directory in which `recexplore tokenize` has run."
        )
    return folder / model


def _vocabulary(work: str) -> Vocabulary:
    return Vocabulary(Path(work) / pipeline.VOCABULARY)

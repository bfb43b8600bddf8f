"""The trained models of a work directory, ready to be asked about histories of cluster ids.

Between the stages and the compiled steps: it puts histories into words and words into tokens, and
hands the arrays to recexplore.inference. No TensorFlow is imported, so it starts quickly.
"""

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from recexplore import artifacts
from recexplore.errors import InputError
from recexplore.inference import exhaustive
from recexplore.inference.best_of_n import Batch, BestOfN, Exploration
from recexplore.inference.bulk import Times, run_in_batches, silent, stream
from recexplore.inference.context import Prompts, prefix_cache, read_prompts
from recexplore.inference.grouping import Grouped, share
from recexplore.inference.launch import Model, Ready, bucket, check_model, pad_columns
from recexplore.interests.cluster_table import ClusterTable
from recexplore.models import saved
from recexplore.models.networks import LANGUAGE_MODELS
from recexplore.models.reward_model import RewardModel
from recexplore.models.trie import Trie, build_trie, exclude_mask
from recexplore.tasks.prompts import alignment_prompt, novelty_prompt
from recexplore.tasks.vocabulary import Vocabulary, check_embedding

NETWORK = saved.NETWORK
_PAIRS_AT_ONCE = 1 << 25  # of nodes of the exhaustive trunk, over a batch
History = Sequence[int]


def description_trie(vocabulary: Vocabulary, descriptions: Sequence[str]) -> Trie:
    """The descriptions of all clusters, in order, as token sequences that end in EOS.

    Raises:
      InputError: the vocabulary can't spell one, or can't tell two apart.
    """
    sequences = vocabulary.encode_descriptions(descriptions)
    return build_trie(sequences, vocabulary.eos_id, vocabulary.size, vocabulary.pad_id)


def load_model(folder: Path, vocabulary: Vocabulary, shared: dict[Any, Any] | None = None) -> Model:
    """A trained model from its folder.

    Args:
      folder: of the model.
      vocabulary: that it was trained for.
      shared: models loaded with the same dictionary share a frozen transformer in memory.

    Raises:
      InputError: there is none, or it was made for another vocabulary.
    """
    description = artifacts.read_json(folder / NETWORK)
    network = saved.rebuild(description)
    check_embedding(vocabulary, network.config.vocab_size, folder)
    pretrained = description.get("pretrained")
    parameters = saved.load_parameters(folder, network, pretrained, shared)
    return Model(network, parameters, description.get("history_length"))  # older ones lack it


def load_explorer(
    work: Path, names: Sequence[str], batch_size: int
) -> tuple["Explorer", dict[str, Model]]:
    """What is needed to ask the models of a work directory, and those of the names given.

    Args:
      work: the work directory.
      names: of models.
      batch_size: histories a call of a compiled step.
    """
    vocabulary = Vocabulary(work / "vocabulary")
    descriptions = ClusterTable.read(work / "clusters").descriptions
    shared: dict[Any, Any] = {}
    models = {name: load_model(work / "models" / name, vocabulary, shared) for name in names}
    return Explorer(vocabulary, descriptions, batch_size), models


class Explorer:
    """Asks models about histories.

    A history longer than a model was trained for loses its oldest clusters: the alignment model
    reads the last K, a novelty model as many as its longest examples named. None of the whole
    history is proposed all the same. A prompt that has more tokens than a training row has room for
    (`pipeline.train.max_length`) loses its oldest tokens, as in training; so does that of a model
    which an older version trained, whose description says nothing of histories.

    Args:
      vocabulary: of prompts and descriptions.
      descriptions: of all clusters.
      batch_size: histories a call of a compiled step.
    """

    def __init__(self, vocabulary: Vocabulary, descriptions: Sequence[str], batch_size: int):
        self._vocabulary = vocabulary
        self._descriptions = descriptions
        self._batch_size = batch_size
        self._trie = description_trie(vocabulary, descriptions)
        self._on_device = jax.device_put(self._trie)

    @property
    def num_clusters(self) -> int:
        """M."""
        return len(self._descriptions)

    @functools.cached_property
    def _tree(self) -> exhaustive.Tree:
        return jax.device_put(exhaustive.build_tree(self._trie))

    def explore(
        self,
        novelty: Model,
        alignment: Model,
        histories: Sequence[History],
        banned: Sequence[Sequence[int]],
        settings: BestOfN,
        seed: int,
        progress: Callable[..., None] = silent,
    ) -> Exploration:
        """Best of n for every history.

        Args:
          novelty: proposes.
          alignment: scores.
          histories: B histories of cluster ids, oldest first.
          banned: for each history, clusters not to propose besides its own.
          settings: n, k and how to draw and choose.
          seed: of the draws; same seed, history and banned clusters, same answer.
          progress: called as progress(histories done, all).

        Returns:
          numpy arrays; `draws` are the proposals behind them.

        Raises:
          InputError: a history that excludes all clusters, or another that can't be explored; see
            `launch.Ready`.
        """
        batch = self.batch(novelty, alignment, histories, banned)
        ready = self._ready(novelty, alignment)
        ready.check(batch)
        key = jax.random.key(seed)
        return run_in_batches(
            lambda rows: ready.launch(rows, key, settings),
            pad_columns(batch),
            batch_size=min(self._rows_of(settings), bucket(len(histories))),
            progress=progress,
        )

    def explore_stream(
        self,
        novelty: Model,
        alignment: Model,
        batches: Iterable[Sequence[History]],
        banned: Sequence[int],
        settings: BestOfN,
        seed: int,
        take: Callable[[Exploration], None],
    ) -> Times:
        """Best of n for batch after batch; what a batch's histories begin with is read once.

        Args:
          novelty: proposes.
          alignment: scores.
          batches: each of at most `batch_size` histories of cluster ids, oldest first; see
            `grouping.deal`.
          banned: clusters not to propose.
          settings: n, k and how to draw and choose.
          seed: of the draws; the same answers as `explore` gives, but for rounding.
          take: gets each batch's answers, in order, in another thread.

        Returns:
          Where the time went.

        Raises:
          InputError: see `explore`.
        """
        ready = self._ready(novelty, alignment)
        key, rows = jax.random.key(seed), self._rows_of(settings)
        latest: list[Any] = [None, None]  # what batches begin with, and as the models have read it

        def prepared() -> Iterator[Grouped]:
            for histories in batches:
                for start in range(0, len(histories), rows):
                    some = histories[start : start + rows]
                    batch = self.batch(novelty, alignment, some, [banned] * len(some))
                    ready.check(batch)
                    yield share(batch, self._vocabulary.prefix, rows)

        def launch(grouped: Grouped) -> Exploration:
            said = [prompt.tokens.tobytes() for prompt in grouped.beginnings]
            if latest[0] != said:
                latest[:] = said, ready.read(grouped.beginnings)
            return ready.launch(grouped.batch, key, settings, latest[1])

        def answered(grouped: Grouped, found: Exploration) -> None:
            take(jax.tree.map(lambda values: values[: grouped.rows], found))

        return stream(prepared(), launch, answered)

    def batch(
        self,
        novelty: Model,
        alignment: Model,
        histories: Sequence[History],
        banned: Sequence[Sequence[int]],
    ) -> Batch:
        """Histories as both models read them, in numpy; see `explore`.

        Raises:
          InputError: a cluster that doesn't exist.
        """
        self._check_exist(histories)
        return Batch(
            self._prompts(novelty_prompt, histories, novelty),
            self._prompts(alignment_prompt, histories, alignment),
            _padded(histories),
            _padded(banned),
        )

    def log_probabilities(
        self,
        novelty: Model,
        histories: Sequence[History],
        excluded: Bool[np.ndarray, "B X M"],
        progress: Callable[..., None] = silent,
    ) -> Float[np.ndarray, "B X M"]:
        """Exact log-probability of every cluster after each history, for X sets of exclusions.

        Args:
          novelty: the model.
          histories: B histories of cluster ids, oldest first.
          excluded: clusters that can't come next; their log-probability is -inf.
          progress: called as progress(histories done, all).
        """

        @jax.jit
        def step(params, prefix, trie, tree, rows):
            prompts, excluded = rows
            context = read_prompts(novelty.network, params, prefix, prompts)
            logits = exhaustive.node_logits(novelty.network, params, trie, tree, context)
            return jax.vmap(
                lambda mask: exhaustive.among_allowed(trie, logits, exclude_mask(trie, mask)),
                in_axes=1,
                out_axes=1,
            )(excluded)

        self._check_exist(histories)
        self._check_model("novelty", novelty, LANGUAGE_MODELS)
        rows = (self._prompts(novelty_prompt, histories, novelty), excluded)
        return self._in_batches(step, novelty, rows, progress)

    def scores(
        self,
        alignment: Model,
        histories: Sequence[History],
        progress: Callable[..., None] = silent,
    ) -> Float[np.ndarray, "B M"]:
        """The alignment score of every cluster after each history."""

        @jax.jit
        def step(params, prefix, trie, tree, prompts):
            context = read_prompts(alignment.network, params, prefix, prompts)
            return exhaustive.all_scores(alignment.network, params, trie, tree, context)

        self._check_exist(histories)
        self._check_model("alignment", alignment, (RewardModel,))
        rows = self._prompts(alignment_prompt, histories, alignment)
        return self._in_batches(step, alignment, rows, progress)

    def _ready(self, novelty: Model, alignment: Model) -> Ready:
        prefix, padding = self._vocabulary.prefix, self._vocabulary.pad_id
        return Ready(novelty, alignment, (prefix, prefix), self._trie, pad_id=padding)

    def _rows_of(self, settings: BestOfN) -> int:
        """Histories a call of the compiled step."""
        return self._batch_size if settings.sampler != "exhaustive" else self._rows_at_once()

    def _rows_at_once(self) -> int:
        """Histories whose exhaustive trunks fit in memory together."""
        pairs = max(self._tree.trunk.ancestors.size, 1)
        return max(1, min(self._batch_size, _PAIRS_AT_ONCE // pairs))

    def _check_exist(self, histories: Sequence[History]) -> None:
        count = self.num_clusters
        for history in histories:
            if any(not 0 <= cluster < count for cluster in history):
                raise InputError(
                    f"History {list(history)} names a cluster that doesn't exist; there are "
                    f"0..{count - 1}."
                )

    def _check_model(self, name: str, model: Model, kinds: tuple[type, ...]) -> None:
        vocabulary = self._vocabulary
        check_model(name, model, kinds, vocabulary.prefix, self._trie, vocabulary.pad_id)

    def _in_batches(self, step: Callable[..., Any], model: Model, rows: Any, progress) -> Any:
        prefix = prefix_cache(
            model.network, model.params, jnp.asarray(self._vocabulary.prefix, jnp.int32)
        )
        return run_in_batches(
            lambda some: step(model.params, prefix, self._on_device, self._tree, some),
            rows,
            batch_size=self._rows_at_once(),
            progress=progress,
        )

    def _prompts(
        self, write: Callable[[Sequence[str]], str], histories: Sequence[History], model: Model
    ) -> Prompts:
        room = model.network.config.max_length - self._trie.max_length
        if model.history_length:
            histories = [history[-model.history_length :] for history in histories]
        texts = [write([self._descriptions[cluster] for cluster in h]) for h in histories]
        return Prompts(*self._vocabulary.encode_prompts(texts, room))


def _padded(lists: Sequence[Sequence[int]]) -> Int[np.ndarray, "B width"]:
    """Right-padded with -1."""
    padded = np.full((len(lists), max(map(len, lists), default=0)), -1, np.int32)
    for row, values in zip(padded, lists, strict=True):
        row[: len(values)] = values
    return padded

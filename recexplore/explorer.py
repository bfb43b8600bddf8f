"""The trained models of a work directory, ready to be asked about histories of cluster ids.

Between the stages and the compiled steps: it puts histories into words and words into tokens, and
hands the arrays to recexplore.inference. No TensorFlow is imported, so it starts quickly.
"""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np
from jaxtyping import Bool, Float

from recexplore import artifacts
from recexplore.errors import InputError
from recexplore.inference import exhaustive
from recexplore.inference.best_of_n import Batch, BestOfN, Exploration, explore_step
from recexplore.inference.bulk import run_in_batches
from recexplore.inference.sampler import Prompts
from recexplore.models import saved
from recexplore.models.trie import Trie, build_trie
from recexplore.tasks.prompts import alignment_prompt, novelty_prompt
from recexplore.tasks.vocabulary import EOS_ID, Vocabulary

NETWORK = "network.json"
History = Sequence[int]


class Model(NamedTuple):
    """A network and its parameters."""

    network: nn.Module
    params: Any


def description_trie(vocabulary: Vocabulary, descriptions: Sequence[str]) -> Trie:
    """The descriptions of all clusters, in order, as token sequences that end in EOS."""
    sequences = [vocabulary.encode_description(text) for text in descriptions]
    return build_trie(sequences, EOS_ID, vocabulary.size)


def load_model(folder: Path, vocabulary: Vocabulary) -> Model:
    """A trained model from its folder.

    Raises:
      InputError: there is none, or it was made for another vocabulary.
    """
    network = saved.rebuild(artifacts.read_json(folder / NETWORK))
    if network.config.vocab_size != vocabulary.size:
        raise InputError(
            f"{folder} holds a model for a vocabulary of {network.config.vocab_size} pieces, but "
            f"{vocabulary.path} has {vocabulary.size}. Train the model again."
        )
    return Model(network, saved.load_parameters(folder, network))


class Explorer:
    """Asks models about histories.

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

    def explore(
        self,
        novelty: Model,
        alignment: Model,
        histories: Sequence[History],
        excluded: Bool[np.ndarray, "B M"],
        settings: BestOfN,
        seed: int,
        progress: Callable[..., None],
    ) -> Exploration:
        """Best of n for every history.

        Args:
          novelty: proposes.
          alignment: scores.
          histories: B histories of cluster ids, oldest first.
          excluded: clusters not to propose, besides the history's own.
          settings: n, k and temperature.
          seed: of the draws; a history's draws depend on it and on the history's place.
          progress: called as progress(histories done, all).

        Returns:
          numpy arrays; `draws` are the proposals behind them.

        Raises:
          InputError: a history that excludes all clusters.
        """
        excluded = excluded | self.clusters_of(histories)
        full = np.flatnonzero(excluded.all(axis=1))
        if len(full):
            raise InputError(
                f"History {list(histories[full[0]])} leaves no cluster to propose: all "
                f"{len(self._descriptions)} are excluded. Ask for fewer exclusions."
            )
        batch = Batch(
            self._prompts(novelty_prompt, histories, novelty),
            self._prompts(alignment_prompt, histories, alignment),
            excluded,
            np.arange(len(histories), dtype=np.int32),
        )
        step = functools.partial(
            explore_step,
            novelty.params,
            alignment.params,
            self._on_device,
            key=jax.random.key(seed),
            settings=settings,
            novelty_model=novelty.network,
            alignment_model=alignment.network,
        )
        return run_in_batches(
            lambda rows: step(batch=rows), batch, batch_size=self._batch_size, progress=progress
        )

    def log_probabilities(
        self,
        novelty: Model,
        histories: Sequence[History],
        excluded: Bool[np.ndarray, "B X M"],
        progress: Callable[..., None],
    ) -> Float[np.ndarray, "B X M"]:
        """Exact log-probability of every cluster after each history, for X sets of exclusions.

        Args:
          novelty: the model.
          histories: B histories of cluster ids, oldest first.
          excluded: clusters that can't come next; their log-probability is -inf.
          progress: called as progress(histories done, all).
        """
        tree = jax.device_put(exhaustive.build_tree(self._trie, leaves=False))

        @jax.jit
        def step(params, trie, tree, rows):
            return exhaustive.log_probabilities(novelty.network, params, trie, tree, *rows)

        return run_in_batches(
            lambda rows: step(novelty.params, self._on_device, tree, rows),
            (self._prompts(novelty_prompt, histories, novelty), excluded),
            batch_size=self._batch_size,
            progress=progress,
        )

    def scores(
        self, alignment: Model, histories: Sequence[History], progress: Callable[..., None]
    ) -> Float[np.ndarray, "B M"]:
        """The alignment score of every cluster after each history."""
        tree = jax.device_put(exhaustive.build_tree(self._trie, leaves=True))

        @jax.jit
        def step(params, trie, tree, prompts):
            return exhaustive.scores(alignment.network, params, trie, tree, prompts)

        return run_in_batches(
            lambda rows: step(alignment.params, self._on_device, tree, rows),
            self._prompts(alignment_prompt, histories, alignment),
            batch_size=self._batch_size,
            progress=progress,
        )

    def clusters_of(self, lists: Sequence[History]) -> Bool[np.ndarray, "B M"]:
        """Which clusters stand in each list, as a mask.

        Raises:
          InputError: a cluster that doesn't exist.
        """
        mask = np.zeros((len(lists), len(self._descriptions)), bool)
        for row, clusters in zip(mask, lists, strict=True):
            if any(not 0 <= cluster < len(row) for cluster in clusters):
                raise InputError(
                    f"History {list(clusters)} names a cluster that doesn't exist; there are "
                    f"0..{len(row) - 1}."
                )
            row[list(clusters)] = True
        return mask

    def _prompts(
        self, write: Callable[[Sequence[str]], str], histories: Sequence[History], model: Model
    ) -> Prompts:
        room = model.network.config.max_length - self._trie.max_length
        texts = [write([self._descriptions[cluster] for cluster in h]) for h in histories]
        return Prompts(*self._vocabulary.encode_prompts(texts, room))

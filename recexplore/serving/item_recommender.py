"""Which items of given clusters a user is shown: a trained recommender and an index by cluster.

Items lie in the order of their clusters, so that those of a cluster are neighbours. Asked for a
cluster, only its rows are read and scored: the time depends on the clusters asked for, not on how
many items there are. No TensorFlow is imported, so it starts quickly.
"""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
from jaxtyping import Array, Float, Int

from recexplore import artifacts
from recexplore.errors import InputError
from recexplore.inference.launch import bucket
from recexplore.models import saved
from recexplore.models.sequential_recommender import SequentialRecommender

_CATALOGUE = "catalogue.parquet"
_NUMBERS_AT_ONCE = 1 << 24  # of gathered item vectors, 64 MiB
_NOT_THERE = np.iinfo(np.int32).max


class Ranked(NamedTuple):
    """The best items of each cluster that was asked for.

    Attributes:
      items: item numbers, best first; −1 where a cluster has fewer.
      scores: higher is better, comparable within a row; −inf beside −1.
    """

    items: Int[np.ndarray, "B C k"]
    scores: Float[np.ndarray, "B C k"]


class _Asked(NamedTuple):
    """What the compiled step is asked, padded to buckets.

    Attributes:
      items: the last items of each sequence, −1 behind the end.
      lengths: how many those are.
      begins: where the items of each cluster begin in the order of clusters.
      sizes: how many a cluster has; 0 for none.
      left_out: places in the order of clusters, ascending, `_NOT_THERE` behind the last.
    """

    items: Int[Array, "B T"]
    lengths: Int[Array, "B"]
    begins: Int[Array, "B C"]
    sizes: Int[Array, "B C"]
    left_out: Int[Array, "B X"]


def write_description(folder: Path, description: dict[str, Any], catalogue: pa.Table) -> None:
    """Writes what `ItemRecommender.open` needs beside a model's checkpoints.

    Args:
      folder: of the model.
      description: of `saved.describe`, and `clusters`, the fingerprint of the clusters.
      catalogue: ITEM_CATALOGUE.
    """
    artifacts.write_table(folder / _CATALOGUE, catalogue, artifacts.ITEM_CATALOGUE)
    artifacts.write_json(folder / saved.NETWORK, description)


class ItemRecommender:
    """Ranks the items of clusters for users.

    Args:
      network: the model.
      params: its variables.
      item_ids: number → id.
      item_clusters: the cluster of each item.
      popularity: of each item lately, above 0; its logarithm is part of the score.
      num_clusters: M.

    Attributes:
      item_ids: number → id.
    """

    def __init__(
        self,
        network: SequentialRecommender,
        params: Any,
        item_ids: Sequence[str],
        item_clusters: Int[np.ndarray, "I"],
        popularity: Float[np.ndarray, "I"],
        num_clusters: int,
    ):
        self.item_ids = item_ids
        self._network, self._params = network, params
        self._num_clusters = num_clusters
        self._clusters = np.asarray(item_clusters, np.int64)
        self._numbers = {item: number for number, item in enumerate(item_ids)}
        self._order = np.argsort(self._clusters, kind="stable").astype(np.int32)
        self._places = np.empty_like(self._order)
        self._places[self._order] = np.arange(len(self._order), dtype=np.int32)
        self._offsets = np.searchsorted(self._clusters[self._order], np.arange(num_clusters + 1))
        vectors = functools.partial(network.apply, method="item_vectors")
        self._vectors = jax.jit(vectors)(params, self._order)
        self._priors = jnp.asarray(np.log(popularity)[self._order], jnp.float32)

    @classmethod
    def open(cls, folder: Path, clusters: str, num_clusters: int) -> "ItemRecommender":
        """The recommender that was trained in a folder.

        Args:
          folder: of the model.
          clusters: fingerprint of the clusters that will be asked for.
          num_clusters: how many those are.

        Raises:
          InputError: there is no such model, it is damaged, or was trained for other clusters.
        """
        description = artifacts.read_json(folder / saved.NETWORK)
        catalogue = artifacts.read_table(folder / _CATALOGUE, artifacts.ITEM_CATALOGUE)
        if description.get("clusters") != clusters:
            raise InputError(
                f"{folder} was trained with other clusters than those it is to be asked for. Run "
                "`recexplore tokenize` and `recexplore train --model items` again."
            )
        network = saved.rebuild(description)
        params = saved.load_parameters(folder, network)
        return cls(
            network,
            params,
            catalogue["item_id"].to_pylist(),
            catalogue["cluster_id"].to_numpy(),
            catalogue["recent_popularity"].to_numpy(),
            num_clusters,
        )

    def number(self, item_id: str) -> int | None:
        """An item's number; None for an id that isn't known."""
        return self._numbers.get(item_id)

    def recommend(
        self,
        sequences: Sequence[Sequence[int]],
        clusters: Int[np.ndarray, "B C"],
        count: int,
        excluded: Sequence[Sequence[int]] = (),
    ) -> Ranked:
        """The best items of each user's clusters.

        Args:
          sequences: the item numbers that each user engaged with, oldest first; may be empty.
          clusters: for each user; −1 for none.
          count: k, items for each cluster.
          excluded: for each user, item numbers that aren't recommended, besides those of the
            sequence; empty for nobody's.

        Returns:
          k places for each cluster. They don't depend on who else is asked for, but for the
          rounding of scores.

        Raises:
          InputError: an item or a cluster that doesn't exist, or numbers of users that differ.
        """
        clusters = np.asarray(clusters)
        excluded = excluded if len(excluded) else [()] * len(sequences)
        self._check(sequences, clusters, count, excluded)
        if not clusters.size or not len(self.item_ids):
            shape = (*clusters.shape, count)
            return Ranked(np.full(shape, -1), np.full(shape, -np.inf, np.float32))
        sizes = np.where(clusters < 0, 0, np.diff(self._offsets)[clusters])
        width = bucket(int(sizes.max()))
        columns = bucket(clusters.shape[1])
        per_row = columns * width * self._network.config.model_dim
        rows = min(
            bucket(len(sequences)), 1 << max(_NUMBERS_AT_ONCE // per_row, 1).bit_length() - 1
        )
        parts = []
        for start in range(0, len(sequences), rows):
            part = slice(start, start + rows)
            asked = self._ask(sequences[part], clusters[part], sizes[part], excluded[part], rows)
            found = _rank_step(
                self._params,
                self._vectors,
                self._priors,
                jax.device_put(asked),
                network=self._network,
                width=width,
                count=min(bucket(count), width),
            )
            parts.append(jax.device_get(found))
        return self._gather(parts, clusters.shape, count)

    def _ask(self, sequences, clusters, sizes, excluded, rows: int) -> _Asked:
        users, columns = clusters.shape
        last = [sequence[-self._network.max_items :] for sequence in sequences]
        length = min(bucket(max(map(len, last))), self._network.max_items)
        items = np.full((rows, length), -1, np.int32)
        lengths = np.zeros(rows, np.int32)
        begins, there = (np.zeros((rows, bucket(columns)), np.int32) for _ in range(2))
        begins[:users, :columns] = np.where(clusters < 0, 0, self._offsets[clusters])
        there[:users, :columns] = sizes
        left_out = []
        for row, (sequence, others) in enumerate(zip(sequences, excluded, strict=True)):
            items[row, : len(last[row])] = last[row]
            lengths[row] = len(last[row])
            named = np.array([*sequence, *others], np.int64)
            asked = np.isin(self._clusters[named], clusters[row])  # most others lie elsewhere
            left_out.append(np.sort(self._places[named[asked]]))
        longest = bucket(max(map(len, left_out)))
        padded = np.full((rows, longest), _NOT_THERE, np.int32)
        for row, places in enumerate(left_out):
            padded[row, : len(places)] = places
        return _Asked(items, lengths, begins, there, padded)

    def _gather(self, parts, shape: tuple[int, int], count: int) -> Ranked:
        """The answers of all rows, without padding, as item numbers."""
        joined = (np.concatenate(each) for each in zip(*parts, strict=True))
        places, scores = (each[: shape[0], : shape[1], :count] for each in joined)
        found = self._order[np.minimum(places, len(self._order) - 1)]  # padding may lie behind
        missing = ((0, 0), (0, 0), (0, count - scores.shape[2]))
        return Ranked(
            np.pad(np.where(np.isfinite(scores), found, -1), missing, constant_values=-1),
            np.pad(scores, missing, constant_values=-np.inf),
        )

    def _check(self, sequences, clusters, count, excluded) -> None:
        if clusters.ndim != 2 or not len(sequences) == len(clusters) == len(excluded):
            raise InputError(
                f"There are {len(sequences)} sequences, clusters of shape {clusters.shape} and "
                f"{len(excluded)} lists of excluded items; each user must have one of all three."
            )
        if count < 1:
            raise InputError(f"{count} items of a cluster are asked for; it must be 1 at least.")
        if clusters.size and not -1 <= clusters.min() <= clusters.max() < self._num_clusters:
            wrong = [c for c in clusters.ravel().tolist() if not -1 <= c < self._num_clusters]
            raise InputError(
                f"There is no cluster {wrong[0]}: there are 0..{self._num_clusters - 1}, and -1 "
                "for none."
            )
        for what, lists in (("sequence", sequences), ("excluded items", excluded)):
            for user, numbers in enumerate(lists):
                for number in numbers:
                    if not 0 <= number < len(self.item_ids):
                        raise InputError(
                            f"The {what} of user {user} in the batch name item {number!r}, but "
                            f"item numbers are 0..{len(self.item_ids) - 1}. `number` gives that of "
                            "an id."
                        )


@functools.partial(jax.jit, static_argnames=("network", "width", "count"))
def _rank_step(
    params: Any,
    vectors: Float[Array, "I D"],
    priors: Float[Array, "I"],
    asked: _Asked,
    *,
    network: SequentialRecommender,
    width: int,
    count: int,
) -> tuple[Int[Array, "B C k"], Float[Array, "B C k"]]:
    """Places of the best items of each cluster, in the order of clusters, and their scores."""
    query = network.apply(params, asked.items, asked.lengths)
    column = jnp.arange(width, dtype=jnp.int32).reshape(1, 1, -1)
    places = asked.begins[..., None] + column
    own = jnp.minimum(places, len(vectors) - 1)
    rows = jnp.take(vectors, own, axis=0).astype(query.dtype)
    scores = jnp.einsum("bd,bcnd->bcn", query, rows, preferred_element_type=jnp.float32)
    scores = scores + jnp.take(priors, own)
    among = jax.vmap(jnp.searchsorted)(asked.left_out, places.reshape(len(places), -1))
    among = jnp.minimum(among, asked.left_out.shape[1] - 1)
    met = jnp.take_along_axis(asked.left_out, among, axis=1).reshape(places.shape) == places
    scores = jnp.where((column < asked.sizes[..., None]) & ~met, scores, -jnp.inf)
    best, at = jax.lax.top_k(scores, count)
    return asked.begins[..., None] + at, best

"""A transformer that reads items in the order in which they were consumed and ranks the next one.

As SASRec does (Kang & McAuley 2018), with this package's transformer: causal attention, the hidden
state after the last item is the query, and items are ranked by its product with their vectors,
which are the ones that are read (tied). As in T5 the product is divided by sqrt(D): at the
beginning of training queries then say little.

What it learns is how the next item differs from what is popular: the popularity itself is an offset
that whoever asks adds, that of the training period in training, that of today when ranking (as in
Menon et al. 2021). So what has become popular since doesn't have to be learnt, nor unlearnt.
"""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from recexplore.models.transformer import Transformer, TransformerConfig

_START, _PADDING = 0, 1  # rows of the item table before those of items
_FIRST_ITEM = 2
_ROWS_MULTIPLE = 64  # of the item table, so that it can be dealt out


def recommender_config(
    num_items: int,
    max_items: int,
    *,
    num_layers: int = 1,
    model_dim: int = 64,
    num_heads: int = 2,
    mlp_dim: int = 128,
    dropout_rate: float = 0.3,
    dtype: str = "float32",
) -> TransformerConfig:
    """The transformer of an item recommender.

    Args:
      num_items: I.
      max_items: T, items read at most.
      num_layers: L.
      model_dim: D, of items and queries.
      num_heads: H, query heads and as many for keys and values.
      mlp_dim: width of the gated MLP's hidden layer.
      dropout_rate: on the items and on what each block adds.
      dtype: of activations.
    """
    return TransformerConfig(
        vocab_size=-(-(num_items + _FIRST_ITEM) // _ROWS_MULTIPLE) * _ROWS_MULTIPLE,
        num_layers=num_layers,
        model_dim=model_dim,
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_dim=model_dim // num_heads,
        mlp_dim=mlp_dim,
        max_length=max_items + 1,
        dropout_rate=dropout_rate,
        dtype=dtype,
    )


class SequentialRecommender(nn.Module):
    """Queries by sequences of items, and items' scores by queries.

    Every sequence begins with a start of its own, which is learnt: its query is that of a user with
    no items. What it reads are item numbers from 0 on, and −1 behind the end.

    Attributes:
      config: of the transformer; see `recommender_config`.
    """

    config: TransformerConfig

    def setup(self):
        self.transformer = Transformer(self.config)

    @property
    def max_items(self) -> int:
        """T, items read at most."""
        return self.config.max_length - 1

    def __call__(
        self, items: Int[Array, "B T"], lengths: Int[Array, "B"], deterministic: bool = True
    ) -> Float[Array, "B D"]:
        """The query after the first `lengths` items of each sequence, which may be none."""
        hidden, _ = self.prefill(items, deterministic)
        return jnp.take_along_axis(hidden, lengths[:, None, None], axis=1)[:, 0]

    def prefill(self, items: Int[Array, "B T"], deterministic: bool = True):
        """The queries after 0, 1, … T items, [B, T + 1, D], and the transformer's segment."""
        rows = jnp.where(items < 0, _PADDING, items + _FIRST_ITEM)
        rows = jnp.pad(rows, ((0, 0), (1, 0)), constant_values=_START)
        return self.transformer.prefill(rows, deterministic)

    def scores(
        self, queries: Float[Array, "*batch D"], items: Int[Array, "N"]
    ) -> Float[Array, "*batch N"]:
        """Scores of N items, in float32: how much more often than by popularity, as a logarithm."""
        return self.transformer.token_logits(queries, items + _FIRST_ITEM) * self._scale

    def paired_scores(
        self, queries: Float[Array, "P D"], items: Int[Array, "P"]
    ) -> Float[Array, "P"]:
        """The score of one item each by P queries."""
        return self.transformer.paired_logits(queries, items + _FIRST_ITEM) * self._scale

    def item_vectors(self, items: Int[Array, "N"]) -> Float[Array, "N D"]:
        """Vectors, of which the product with a query is the score."""
        rows = items + _FIRST_ITEM
        return jnp.take(self.transformer.token_embedder, rows, axis=0) * self._scale

    @property
    def _scale(self) -> float:
        return self.config.model_dim**-0.5

"""T5's relative positions: how far a key lies from a query, in buckets, as a bias for each head.

Near distances have a bucket each, farther ones share buckets whose widths grow in proportion to the
distance, and all beyond the greatest share the last (Raffel et al. 2020, section 2.1). Of 8 buckets
up to a distance of 16, looking back only:

    distance  0 1 2 3 4 5 6 7 8 … 11 12 … 16 …
    bucket    0 1 2 3 4 4 5 5 6    6  7     7
"""

import functools
import math
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from recexplore.models.layers import parameter


@functools.cache
def bucket_table(num_buckets: int, max_distance: int) -> Int[np.ndarray, "distances"]:
    """The bucket of every distance 0, 1, … up to `max_distance`, which stands for all beyond.

    It is computed in float32, as transformers does, with which it agrees at the edges that rounding
    decides. T5X adds an epsilon inside the logarithm, which changes nothing at the sizes of
    published models.

    Args:
      num_buckets: of one direction.
      max_distance: from which on all share the last bucket.
    """
    exact = num_buckets // 2
    distances = np.arange(max_distance + 1)
    far = np.maximum(distances, 1).astype(np.float32) / np.float32(exact)
    share = np.log(far) / np.float32(math.log(max_distance / exact))
    far = exact + (share * np.float32(num_buckets - exact)).astype(np.int32)
    return np.where(distances < exact, distances, np.minimum(far, num_buckets - 1)).astype(np.int32)


def buckets_of(
    distances: Int[Array, "*any"], num_buckets: int, max_distance: int, both_ways: bool
) -> Int[Array, "*any"]:
    """The bucket of every distance.

    Args:
      distances: position of the key less that of the query.
      num_buckets: of a head's table.
      max_distance: from which on all share the last bucket.
      both_ways: keys may lie on either side; half of the buckets are then for those that come
        later. Otherwise all of those count as distance 0.
    """
    if not both_ways:
        table = jnp.asarray(bucket_table(num_buckets, max_distance))
        return jnp.take(table, jnp.clip(-distances, 0, max_distance))
    half = num_buckets // 2
    table = jnp.asarray(bucket_table(half, max_distance))
    later = jnp.where(distances > 0, half, 0)
    return later + jnp.take(table, jnp.minimum(jnp.abs(distances), max_distance))


class RelativeBias(nn.Module):
    """A number for every head and bucket."""

    config: Any

    @nn.compact
    def __call__(self, buckets: Int[Array, "*any"]) -> Float[Array, "H *any"]:
        c = self.config
        even = nn.initializers.variance_scaling(1.0, "fan_avg", "uniform")
        axes = {"heads": c.num_heads, "relpos_buckets": c.num_buckets}
        return jnp.take(parameter(self, "rel_embedding", axes, even), buckets, axis=1)

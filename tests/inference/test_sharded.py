"""Eight devices give what one gives: batch over `data`, heads, MLP and vocabulary over `tensor`."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_pair import (
    ALIGNMENT,
    ALIGNMENT_PARAMS,
    NOVELTY,
    NOVELTY_PARAMS,
    batch_of,
    explore,
    init,
    prefix_of,
)

from recexplore.distributed import partitioning
from recexplore.inference.best_of_n import Prefixes


@functools.cache
def on_eight_devices():
    """Parameters dealt out over the mesh, prefixes read with them, and the batch."""
    mesh = partitioning.make_mesh(data=4, tensor=2)
    params = []
    for model, whole in ((NOVELTY, NOVELTY_PARAMS), (ALIGNMENT, ALIGNMENT_PARAMS)):
        boxed = jax.eval_shape(init(model), jax.ShapeDtypeStruct((1, 2), jnp.int32))
        shardings = partitioning.shardings_of(boxed, mesh, partitioning.DEFAULT_RULES)
        partitioning.check_shapes(nn.unbox(boxed), shardings)
        params.append(jax.device_put(whole, shardings))
    query = params[0]["params"]["layers"]["self_attention"]["query"]
    assert query.addressable_shards[0].data.shape[2] == NOVELTY.config.num_heads // 2
    return dict(
        novelty_params=params[0],
        alignment_params=params[1],
        prefixes=Prefixes(prefix_of(NOVELTY, params[0]), prefix_of(ALIGNMENT, params[1])),
        batch=jax.device_put(batch_of(), partitioning.batch_sharding(mesh)),
    )


@pytest.mark.parametrize(
    "settings",
    [
        dict(num_samples=16, num_chosen=3, sampler="independent"),
        dict(
            num_samples=5,
            num_chosen=2,
            sampler="distinct",
            temperature=1.5,
            selection_temperature=0.7,
        ),
        dict(num_samples=1, num_chosen=3, sampler="exhaustive", relevance_weight=0.5),
    ],
    ids=lambda settings: settings["sampler"],
)
def test_eight_devices_give_what_one_gives(settings):
    one, eight = explore(**settings), explore(**on_eight_devices(), **settings)
    assert len(eight.clusters.sharding.device_set) == 8
    for ours, theirs in zip(jax.tree.leaves(eight), jax.tree.leaves(one), strict=True):
        if ours.dtype == jnp.int32:
            np.testing.assert_array_equal(ours, theirs)
        else:
            np.testing.assert_allclose(ours, theirs, atol=1e-5)

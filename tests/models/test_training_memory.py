"""What training at size needs: layers computed again, small parameters, activations dealt out."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recexplore.distributed import partitioning
from recexplore.models.reward_model import RewardModel
from recexplore.models.saved import abstract_parameters
from recexplore.models.transformer import Transformer, TransformerConfig

CONFIG = TransformerConfig(
    vocab_size=32,
    num_layers=2,
    model_dim=16,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    mlp_dim=24,
    max_length=16,
    lora_rank=2,
)
TOKENS = jnp.asarray(np.random.default_rng(0).integers(1, 32, (4, 6)), jnp.int32)
ONE = jnp.ones((1, 2), jnp.int32)


def shapes_of(config):
    return jax.eval_shape(lambda: Transformer(config).init(jax.random.key(0), ONE))


@functools.cache
def variables_of(config):
    random = np.random.default_rng(1)

    def any_value(x):
        return jnp.asarray(random.normal(size=x.shape, scale=0.25), x.dtype)

    return jax.tree.map(any_value, nn.unbox(shapes_of(config)))


def loss(variables, config):
    keys = {"dropout": jax.random.key(3)}
    logits = Transformer(config).apply(variables, TOKENS, deterministic=False, rngs=keys)
    return jnp.mean(logits**2)


@functools.cache
def gradients(remat):
    config = dataclasses.replace(CONFIG, remat=remat, dropout_rate=0.3)
    return jax.jit(jax.grad(loss), static_argnums=1)(variables_of(CONFIG), config)


@pytest.mark.parametrize("remat", ["full", "dots", "dots_no_batch"])
def test_what_is_computed_again_gives_the_same_gradients(remat):
    for ours, kept in zip(
        *map(jax.tree.leaves, (gradients(remat), gradients("none"))), strict=True
    ):
        np.testing.assert_allclose(ours, kept, rtol=1e-4, atol=1e-6)


def test_each_policy_keeps_less_than_the_one_before():
    def kept(remat):
        """Numbers between the forward and the backward pass."""
        config = dataclasses.replace(CONFIG, remat=remat)
        shapes = nn.unbox(shapes_of(config))
        backward = jax.eval_shape(lambda v: jax.vjp(lambda v: loss(v, config), v)[1], shapes)
        return sum(x.size for x in jax.tree.leaves(backward))

    sizes = [kept(remat) for remat in ("none", "dots", "dots_no_batch", "full")]
    assert sizes == sorted(sizes, reverse=True) and len({*sizes}) == len(sizes)


def test_small_parameters_are_rounded_ones_and_adapters_stay_wide():
    config = dataclasses.replace(CONFIG, param_dtype="bfloat16")
    shapes = nn.unbox(shapes_of(config))
    assert {x.dtype.name for x in jax.tree.leaves(shapes["params"])} == {"bfloat16"}
    assert {x.dtype.name for x in jax.tree.leaves(shapes["lora"])} == {"float32"}
    wide = variables_of(CONFIG)
    small = wide | {"params": jax.tree.map(lambda x: x.astype(jnp.bfloat16), wide["params"])}
    rounded = jax.tree.map(lambda x: x.astype(jnp.float32), small)
    found = jax.jit(Transformer(config).apply)(small, TOKENS)
    expected = jax.jit(Transformer(CONFIG).apply)(rounded, TOKENS)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_eight_devices_read_as_one_does_and_deal_out_what_they_compute():
    mesh = partitioning.make_mesh(data=2, fsdp=2, tensor=2)
    model, rules = Transformer(CONFIG), list(partitioning.DEFAULT_RULES)
    boxed = shapes_of(CONFIG)
    shardings = partitioning.shardings_of(boxed, mesh, rules)
    whole = variables_of(CONFIG)
    parts = jax.device_put(whole, shardings)
    tokens = jax.device_put(TOKENS, partitioning.batch_sharding(mesh))
    with jax.set_mesh(mesh), nn.logical_axis_rules(rules):
        found = jax.jit(model.apply)(parts, tokens)
    assert found.sharding.spec == jax.P(("data", "fsdp"), None, "tensor")
    np.testing.assert_allclose(found, jax.jit(model.apply)(whole, TOKENS), atol=1e-4)


def test_parameters_are_made_where_they_belong():
    """Under rules and a mesh, from a batch of one sequence, which can't be dealt out."""
    mesh = partitioning.make_mesh(data=2, fsdp=2, tensor=2)
    rules = list(partitioning.DEFAULT_RULES)

    def initialize():
        return RewardModel(CONFIG).init(jax.random.key(0, impl="rbg"), ONE, method="prefill")

    shardings = partitioning.shardings_of(jax.eval_shape(initialize), mesh, rules)
    with jax.set_mesh(mesh), nn.logical_axis_rules(rules):
        made = jax.jit(lambda: nn.unbox(initialize()), out_shardings=shardings)()
        shapes = abstract_parameters(RewardModel(CONFIG))
    assert jax.tree.map(jnp.shape, made) == jax.tree.map(jnp.shape, shapes)
    query = made["params"]["transformer"]["layers"]["self_attention"]["query"]
    assert query.addressable_shards[0].data.shape == (2, 8, 2, 8)
    query_b = made["lora"]["transformer"]["layers"]["self_attention"]["query_b"]
    assert query_b.addressable_shards[0].data.shape == (2, 2, 2, 8)


def test_only_a_plain_batch_is_dealt_out_and_only_by_rules():
    mesh = partitioning.make_mesh(data=2, fsdp=2, tensor=2)
    variables = nn.unbox(shapes_of(CONFIG))

    def constraints(tokens, rules):
        with jax.set_mesh(mesh), nn.logical_axis_rules(rules):
            read = jax.make_jaxpr(lambda v: Transformer(CONFIG).apply(v, tokens))
            return str(read(variables)).count("sharding_constraint")

    rules = list(partitioning.DEFAULT_RULES)
    of_parameters = constraints(TOKENS[0], rules)
    assert constraints(TOKENS[:, None], rules) == of_parameters
    assert constraints(TOKENS, rules) > of_parameters + 4
    assert constraints(TOKENS, ()) == 0

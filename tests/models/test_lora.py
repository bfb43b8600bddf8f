"""Low-rank adapters: nothing at the start, the merged network after, gradients of them alone."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recexplore.distributed import partitioning
from recexplore.errors import InputError
from recexplore.models import lora
from recexplore.models.layers import PROJECTIONS
from recexplore.models.reward_model import RewardModel
from recexplore.models.transformer import Transformer, TransformerConfig

CONFIG = TransformerConfig(
    vocab_size=30,
    num_layers=2,
    model_dim=16,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    mlp_dim=24,
    max_length=16,
    attention_bias=True,
    attention_windows=(3, 0),
    lora_rank=3,
    lora_targets=PROJECTIONS,
    lora_scale=0.5,
)
PLAIN = dataclasses.replace(CONFIG, lora_rank=0)


def some_tokens(*shape):
    return jnp.asarray(np.random.default_rng(0).integers(1, 30, shape), jnp.int32)


def initialize(model):
    return model.init(jax.random.key(0), jnp.ones((1, 2), jnp.int32), method="prefill")


@functools.cache
def trained(network):
    """Variables in which no adapter is zero, and so nothing is without effect."""
    random = np.random.default_rng(1)

    def any_value(x):
        return jnp.asarray(random.normal(size=x.shape, scale=0.3), x.dtype)

    shapes = jax.eval_shape(lambda: nn.unbox(initialize(network(CONFIG))))
    return jax.tree.map(any_value, shapes)


@functools.partial(jax.jit, static_argnames=("model", "method"))
def apply(model, variables, *args, method=None, **kwargs):
    return model.apply(variables, *args, method=method, **kwargs)


def test_at_the_start_adapters_change_nothing():
    model = Transformer(dataclasses.replace(CONFIG, num_layers=1, lora_targets=("query", "wo")))
    plain = Transformer(dataclasses.replace(PLAIN, num_layers=1))
    variables = jax.jit(lambda: nn.unbox(initialize(model)))()
    layers, tokens = variables["lora"]["layers"], some_tokens(2, 6)
    np.testing.assert_array_equal(
        apply(model, variables, tokens), apply(plain, {"params": variables["params"]}, tokens)
    )
    for part, kernel in (("self_attention", "query"), ("mlp", "wo")):  # not stuck at zero
        assert np.any(layers[part][f"{kernel}_a"]) and not np.any(layers[part][f"{kernel}_b"])


def test_adapters_have_the_paths_and_axes_of_their_kernels():
    boxed = jax.eval_shape(lambda: initialize(Transformer(CONFIG)))
    axes = nn.get_partition_spec(boxed)["lora"]["layers"]
    assert axes["self_attention"]["query_a"] == jax.P("layers", "embed", "lora_rank")
    assert axes["self_attention"]["query_b"] == jax.P("layers", "lora_rank", "heads", "kv")
    assert axes["self_attention"]["out_a"] == jax.P("layers", "heads", "kv", "lora_rank")
    assert axes["mlp"]["wo_b"] == jax.P("layers", "lora_rank", "embed")
    mesh = partitioning.make_mesh(data=2, fsdp=2, tensor=2)
    places = partitioning.shardings_of(boxed, mesh, partitioning.DEFAULT_RULES)["lora"]["layers"]
    assert places["self_attention"]["query_b"].spec == jax.P(None, None, "tensor", None)
    few = dataclasses.replace(CONFIG, lora_targets=("value",))
    found = jax.eval_shape(lambda: initialize(Transformer(few)))["lora"]["layers"]
    assert {*found} == {"self_attention"} and {*found["self_attention"]} == {"value_a", "value_b"}


@pytest.mark.parametrize("network", [Transformer, RewardModel])
def test_the_merged_network_is_the_unmerged_one(network):
    variables, tokens = trained(network), some_tokens(2, 6)
    merged, config = lora.merge(variables, CONFIG)
    assert config == PLAIN and {*merged} == {"params"}
    lengths = () if network is Transformer else (jnp.array([6, 4]),)
    found = apply(network(CONFIG), variables, tokens, *lengths)
    np.testing.assert_allclose(
        found, apply(network(config), merged, tokens, *lengths), rtol=1e-4, atol=1e-4
    )
    without = apply(network(config), {"params": variables["params"]}, tokens, *lengths)
    assert not np.allclose(found, without, atol=0.01)


def test_reading_at_some_places_has_adapters_too():
    variables, tokens = trained(Transformer), some_tokens(1, 5)
    model, positions = Transformer(CONFIG), jnp.arange(5)[None]
    causal = jnp.tril(jnp.ones((5, 5), bool))
    every, _ = apply(model, variables, tokens, method="prefill")
    some, _ = apply(
        model,
        variables,
        *(tokens, positions, causal, (), ()),
        read_at=jnp.array([[3]]),
        method="extend",
    )
    np.testing.assert_allclose(some, every[:, 3:4], atol=1e-4)


def test_gradients_of_adapters_are_those_through_the_merged_kernels():
    """W + scale · A B as a function of A and B, in a network that knows nothing of adapters."""
    mine, frozen = lora.split(trained(RewardModel), CONFIG)

    def loss(mine, merged):
        variables, config = lora.join(mine, frozen), CONFIG
        if merged:
            variables, config = lora.merge(variables, CONFIG)
        lengths = jnp.array([5, 3])
        return jnp.sum(RewardModel(config).apply(variables, some_tokens(2, 5), lengths) ** 2)

    found, expected = (jax.jit(jax.grad(loss), static_argnums=1)(mine, m) for m in (False, True))
    assert {*found["params"]} == {"head", "bias"}

    def compare(path, ours, theirs):
        name = jax.tree_util.keystr(path)
        np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-3, err_msg=name)
        assert np.any(theirs), name

    jax.tree_util.tree_map_with_path(compare, found, expected)


def test_trained_and_frozen_are_told_apart():
    variables = trained(RewardModel)
    mine, frozen = lora.split(variables, CONFIG)
    assert {*mine} == {"lora", "params"} and {*mine["params"]} == {"head", "bias"}
    assert {*frozen} == {"params"} and {*frozen["params"]} == {"transformer"}
    same = jax.tree.map(lambda a, b: a is b, lora.join(mine, frozen), variables)
    assert all(jax.tree.leaves(same))
    everything, nothing = lora.split({"params": variables["params"]}, PLAIN)
    assert nothing == {} and everything == {"params": variables["params"]}


def test_two_models_share_one_frozen_network():
    base = trained(Transformer)["params"]
    novelty, alignment = Transformer(CONFIG), RewardModel(CONFIG)
    first = {"params": base, "lora": trained(Transformer)["lora"]}
    own = trained(RewardModel)
    second = {"params": own["params"] | {"transformer": base}, "lora": own["lora"]}
    before = jax.tree.map(np.asarray, base)
    apply(novelty, first, some_tokens(1, 4))
    score = apply(alignment, second, some_tokens(1, 4), jnp.array([4]))
    head, bias = own["params"]["head"], own["params"]["bias"]
    adapted = {"params": base, "lora": own["lora"]["transformer"]}
    hidden, _ = apply(novelty, adapted, some_tokens(1, 4), method="prefill")
    np.testing.assert_allclose(score[0], hidden[0, 3] @ head + bias, rtol=1e-5)
    jax.tree.map(np.testing.assert_array_equal, base, before)


def test_what_cannot_be_merged_is_named():
    with pytest.raises(InputError, match="no adapters to merge: lora_rank is 0"):
        lora.merge(trained(Transformer), PLAIN)
    with pytest.raises(InputError, match="the variables are params"):
        lora.merge({"params": {}}, CONFIG)

"""The networks against plain recomputation."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recexplore.errors import InputError
from recexplore.models import saved
from recexplore.models.attention import Segment, attend, rotate
from recexplore.models.reward_model import RewardModel
from recexplore.models.transformer import Transformer, TransformerConfig

SIZES = dict(vocab_size=50, num_layers=2, model_dim=16, num_heads=4, head_dim=8, mlp_dim=24)


def make(network=Transformer, **changes):
    config = TransformerConfig(**{**SIZES, "num_kv_heads": 2, "max_length": 32, **changes})
    model = network(config)
    tokens = jnp.ones((1, 2), jnp.int32)
    return model, nn.unbox(model.init(jax.random.key(1), tokens, method="prefill"))


def some_tokens(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).integers(2, 50, shape), jnp.int32)


def plain_attention(queries, keys, values, mask):
    """One query at a time, in float64."""
    repeat = queries.shape[2] // keys.shape[2]
    keys, values = (np.repeat(np.asarray(x, np.float64), repeat, axis=2) for x in (keys, values))
    out = np.zeros(queries.shape)
    for b, t, h in np.ndindex(queries.shape[:3]):
        scores = keys[b, :, h] @ np.asarray(queries[b, t, h], np.float64) / queries.shape[-1] ** 0.5
        weights = np.where(mask[t], np.exp(scores - scores.max()), 0.0)
        out[b, t, h] = weights / weights.sum() @ values[b, :, h]
    return out


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("cut", [1, 4])
def test_attention_over_segments_is_attention_over_their_concatenation(groups, cut):
    random = np.random.default_rng(groups)
    queries, keys, values = (
        jnp.asarray(random.normal(size=(3, 6, h, 8)), jnp.float32) for h in (4, groups, groups)
    )
    mask = np.tril(np.ones((6, 6), bool))
    parts = (slice(None, cut), slice(cut, None))
    segments = tuple(Segment(keys[:, part], values[:, part]) for part in parts)
    masks = tuple(jnp.asarray(mask[:, part])[None] for part in parts)
    found = attend(queries, segments, masks)
    expected = plain_attention(queries, keys, values, mask)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_rotation_makes_products_depend_on_distance_alone():
    random = np.random.default_rng(0)
    a, b = (jnp.asarray(random.normal(size=(1, 1, 1, 8)), jnp.float32) for _ in range(2))

    def product(i, j):
        at = [jnp.full((1, 1), place, jnp.int32) for place in (i, j)]
        return (rotate(a, at[0], 10_000.0) * rotate(b, at[1], 10_000.0)).sum()

    assert float(product(3, 7)) == pytest.approx(float(product(13, 17)), abs=1e-5)
    assert float(product(3, 7)) != pytest.approx(float(product(3, 8)), abs=1e-3)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_continuations_that_share_a_prompt_equal_whole_sequences(kv_heads):
    model, params = make(num_kv_heads=kv_heads)
    prompt, rest = some_tokens(3, 6), some_tokens(3, 5, 4, seed=1)
    _, segment = model.apply(params, prompt, method="prefill")
    hidden, _ = model.apply(
        params,
        rest,
        jnp.broadcast_to(jnp.arange(6, 10), rest.shape),
        jnp.tril(jnp.ones((4, 4), bool)),
        (segment,),
        (jnp.ones((1, 1, 1, 6), bool),),
        method="extend",
    )
    shared = jnp.broadcast_to(prompt[:, None], (3, 5, 6))
    whole = jnp.concatenate([shared, rest], axis=-1).reshape(15, 10)
    expected = model.apply(params, whole)[:, 6:].reshape(3, 5, 4, 50)
    found = model.apply(params, hidden, method="logits")
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_later_tokens_and_padding_change_nothing_before_them():
    model, params = make()
    tokens = some_tokens(2, 8)
    changed = tokens.at[:, 5:].set(0)
    np.testing.assert_allclose(
        model.apply(params, tokens)[:, :5], model.apply(params, changed)[:, :5], atol=1e-6
    )


def test_logits_of_some_tokens_are_those_of_the_whole_vocabulary():
    model, params = make()
    hidden, _ = model.apply(params, some_tokens(2, 4), method="prefill")
    wanted = some_tokens(2, 4, 3, seed=2)
    every = model.apply(params, hidden, method="logits")
    some = model.apply(params, hidden, wanted, method="token_logits")
    np.testing.assert_allclose(some, jnp.take_along_axis(every, wanted, axis=-1), atol=1e-5)


def test_the_reward_model_reads_the_last_real_token():
    model, params = make(RewardModel)
    head = jax.random.normal(jax.random.key(3), (16,))
    params["params"]["head"] = head
    tokens, lengths = some_tokens(3, 7), jnp.array([3, 7, 5])
    found = model.apply(params, tokens, lengths)
    for row in range(3):
        alone = tokens[row : row + 1, : lengths[row]]
        hidden, _ = model.apply(params, alone, method="prefill")
        assert float(found[row]) == pytest.approx(float(hidden[0, -1] @ head), abs=1e-5)


def test_dropout_needs_a_key_and_changes_the_output():
    model, params = make(dropout_rate=0.5)
    tokens = some_tokens(1, 4)
    noisy = model.apply(params, tokens, False, rngs={"dropout": jax.random.key(0)})
    assert not np.allclose(noisy, model.apply(params, tokens))


def test_bfloat16_activations_stay_close_to_float32():
    model, params = make()
    half, _ = make(dtype="bfloat16")
    tokens = some_tokens(2, 6)
    np.testing.assert_allclose(model.apply(params, tokens), half.apply(params, tokens), atol=0.15)


def test_parameters_carry_the_logical_axes_of_t5x():
    model, _ = make()
    abstract = jax.eval_shape(
        lambda: model.init(jax.random.key(0), jnp.ones((1, 2), jnp.int32), method="prefill")
    )
    specs = nn.get_partition_spec(abstract)["params"]
    assert specs["token_embedder"] == jax.P("vocab", "embed")
    assert specs["layers"]["mlp"]["wi_0"] == jax.P("layers", "embed", "mlp")
    assert specs["layers"]["self_attention"]["query"] == jax.P("layers", "embed", "heads", "kv")


def test_one_program_serves_all_calls_of_one_shape():
    model, params = make()
    step = jax.jit(chex.assert_max_traces(lambda p, t: model.apply(p, t), n=1))
    for seed in range(3):
        step(params, some_tokens(2, 5, seed=seed))


def test_a_described_network_is_rebuilt():
    model, _ = make(RewardModel)
    assert saved.rebuild(saved.describe(model)) == model
    with pytest.raises(InputError, match="doesn't fit this version"):
        saved.rebuild({"network": "Mamba", "config": {}})


@pytest.mark.parametrize(
    ("field", "value"),
    [("num_kv_heads", 3), ("head_dim", 7), ("dropout_rate", 1.0), ("dtype", "int8")],
)
def test_impossible_sizes_are_named(field, value):
    with pytest.raises(InputError, match=f"TransformerConfig.{field} is {value!r}"):
        make(**{field: value})

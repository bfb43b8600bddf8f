"""What networks promise beside attention: causality, columns of logits, scores, axes, messages."""

import functools
import re

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recexplore.errors import InputError
from recexplore.models import saved
from recexplore.models.reward_model import RewardModel
from recexplore.models.transformer import Transformer, TransformerConfig

SIZES = dict(vocab_size=50, num_layers=2, model_dim=16, num_heads=4, head_dim=8, mlp_dim=24)


def make(network=Transformer, **changes):
    config = TransformerConfig(**{**SIZES, "num_kv_heads": 2, "max_length": 32, **changes})
    model = network(config)
    return model, some_parameters(model)


def some_parameters(model):
    """Of the right shapes, without the time that compiling `init` takes."""
    tokens = jax.ShapeDtypeStruct((1, 2), jnp.int32)
    shapes = jax.eval_shape(
        functools.partial(model.init, method="prefill"), jax.random.key(0), tokens
    )
    leaves, structure = jax.tree.flatten(nn.unbox(shapes))
    random = np.random.default_rng(1)
    leaves = [random.normal(size=x.shape, scale=0.25).astype(np.float32) for x in leaves]
    return jax.tree.unflatten(structure, map(jnp.asarray, leaves))


@functools.partial(jax.jit, static_argnames=("model", "deterministic", "method"))
def apply(model, params, *args, method=None, **kwargs):
    return model.apply(params, *args, method=method, **kwargs)


def some_tokens(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).integers(2, 50, shape), jnp.int32)


def test_later_tokens_and_padding_change_nothing_before_them():
    model, params = make()
    tokens = some_tokens(2, 8)
    changed = tokens.at[:, 5:].set(0)
    np.testing.assert_allclose(
        apply(model, params, tokens)[:, :5], apply(model, params, changed)[:, :5], atol=1e-6
    )


@pytest.mark.parametrize("changes", [{}, {"logit_softcap": 0.5}, {"tied_embeddings": False}])
def test_logits_of_some_tokens_are_those_of_the_whole_vocabulary(changes):
    model, params = make(**changes)
    hidden, _ = apply(model, params, some_tokens(2, 3, 4), method="prefill")
    wanted = jnp.array([7, 2, 49, 7])
    every = apply(model, params, hidden, method="logits")
    some = apply(model, params, hidden, wanted, method="token_logits")
    np.testing.assert_allclose(some, every[..., wanted], atol=1e-6)
    paired = apply(model, params, hidden, wanted, method="paired_logits")
    np.testing.assert_allclose(paired, every[..., jnp.arange(4), wanted], atol=1e-6)
    if cap := model.config.logit_softcap:
        uncapped, _ = make()
        plain = apply(uncapped, params, hidden, method="logits")
        np.testing.assert_allclose(every, cap * np.tanh(plain / cap), atol=1e-6)


@pytest.mark.parametrize("num_layers", [1, 3])
def test_hidden_states_of_some_places_are_those_of_reading_all(num_layers):
    model, params = make(
        num_layers=num_layers, attention_windows=(0, 2, 4), rope_local_theta=50.0, qk_norm=True
    )
    _, before = apply(model, params, some_tokens(3, seed=3), method="prefill")
    length = 5
    places = jnp.array([[0, 4], [3, 3]])
    arguments = (
        some_tokens(2, length),
        jnp.broadcast_to(3 + jnp.arange(length)[None], (2, length)),
        jnp.tril(jnp.ones((1, length, length), bool)),
        (before,),
        (jnp.ones((1, 1, 3), bool),),
    )
    every, kept = apply(model, params, *arguments, method="extend")
    some, same = apply(model, params, *arguments, read_at=places, method="extend")
    np.testing.assert_allclose(
        some,
        np.take_along_axis(np.asarray(every), np.asarray(places)[..., None], axis=1),
        atol=1e-5,
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), same, kept)


def test_the_reward_model_reads_the_last_real_token():
    model, params = make(RewardModel)
    head, bias = params["params"]["head"], params["params"]["bias"]
    tokens, lengths = some_tokens(3, 7), jnp.array([3, 7, 5])
    found = apply(model, params, tokens, lengths)
    for row in range(3):  # whatever stands after it
        changed = tokens.at[row, lengths[row] :].set(9)
        hidden, _ = apply(model, params, changed, method="prefill")
        last = hidden[row, lengths[row] - 1]
        assert float(found[row]) == pytest.approx(float(last @ head + bias), abs=1e-5)


def test_dropout_needs_a_key_and_changes_the_output():
    model, params = make(dropout_rate=0.5)
    tokens = some_tokens(1, 4)
    noisy = apply(model, params, tokens, deterministic=False, rngs={"dropout": jax.random.key(0)})
    assert not np.allclose(noisy, apply(model, params, tokens))


def test_bfloat16_activations_stay_close_to_float32():
    model, params = make()
    half, _ = make(dtype="bfloat16")
    tokens = some_tokens(2, 6)
    np.testing.assert_allclose(apply(model, params, tokens), apply(half, params, tokens), atol=0.15)


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
    [
        ("vocab_size", 0),
        ("num_layers", 0),
        ("num_kv_heads", 3),
        ("head_dim", 7),
        ("mlp_dim", 0),
        ("max_length", 0),
        ("scan_unroll", 0),
        ("attention_windows", ()),
        ("attention_windows", (4, -1)),
        ("attention_softcap", -1.0),
        ("logit_softcap", -1.0),
        ("attention_scale", -1.0),
        ("activation", "relu"),
        ("norm_epsilon", 0.0),
        ("rope_theta", 0.0),
        ("rope_local_theta", -1.0),
        ("rope_scaling", "yarn"),
        ("rope_factor", 0.0),
        ("rope_high_frequency_factor", 1.0),
        ("param_dtype", "float16"),
        ("remat", "dotz"),
        ("lora_rank", -1),
        ("lora_scale", 0.0),
        ("lora_targets", ()),
        ("lora_targets", ("query", "q_proj")),
        ("dropout_rate", 1.0),
        ("dtype", "int8"),
    ],
)
def test_impossible_sizes_are_named(field, value):
    with pytest.raises(InputError, match=re.escape(f"TransformerConfig.{field} is {value!r}")):
        make(**{field: value})

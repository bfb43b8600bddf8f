"""Attention to segments, and networks that read in parts, against whole sequences in float64."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recexplore.models.attention import KeyValues, attend
from recexplore.models.rotary import frequencies, rotate, rotation
from recexplore.models.transformer import Transformer, TransformerConfig

B, N = 2, 3
PREFIX, HISTORY, OWN = 3, 4, 5  # tokens of each segment
TOTAL = PREFIX + HISTORY + OWN
CAUSAL = np.tril(np.ones((TOTAL, TOTAL), bool))
DISTANCES = np.arange(TOTAL)[:, None] - np.arange(TOTAL)[None, :]


def normal(random, *shape):
    return random.normal(size=shape).astype(np.float32)


def plain_attention(queries, keys, values, mask, softcap=0.0, scale=0.0):
    """Heads of one sequence, one query at a time: [T, heads, head_dim] in float64."""
    queries, keys, values = (np.asarray(x, np.float64) for x in (queries, keys, values))
    repeat = queries.shape[1] // keys.shape[1]
    keys, values = (np.repeat(x, repeat, axis=1) for x in (keys, values))
    out = np.zeros_like(queries)
    for t, h in np.ndindex(queries.shape[:2]):
        scores = keys[:, h] @ queries[t, h] * (scale or queries.shape[-1] ** -0.5)
        if softcap:
            scores = softcap * np.tanh(scores / softcap)
        weights = np.where(mask[t], np.exp(scores), 0.0)
        out[t, h] = weights / weights.sum() @ values[:, h]
    return out


@pytest.mark.parametrize("softcap", [0.0, 1.5])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_attention_to_segments_is_attention_to_their_concatenation(groups, softcap):
    random = np.random.default_rng(groups)
    queries = normal(random, B, N, OWN, 4, 8)
    shapes = ((PREFIX,), (B, HISTORY), (B, N, OWN))
    segments = [KeyValues(*(normal(random, *s, groups, 8) for _ in "kv")) for s in shapes]
    real = np.arange(HISTORY) < np.array([HISTORY, 2])[:, None]  # one history is shorter
    masks = (
        np.ones((1, 1), bool),
        real[:, None, None, :],
        CAUSAL[:OWN, :OWN][None, None],
    )
    found = attend(
        jnp.asarray(queries),
        tuple(jax.tree.map(jnp.asarray, segments)),
        tuple(map(jnp.asarray, masks)),
        softcap,
    )
    for b, n in np.ndindex(B, N):
        parts = [(), (b,), (b, n)]
        keys, values = (
            np.concatenate([x[at] for x, at in zip(kind, parts, strict=True)])
            for kind in zip(*segments, strict=True)
        )
        mask = CAUSAL[PREFIX + HISTORY :].copy()
        mask[:, PREFIX : PREFIX + HISTORY] = real[b]
        expected = plain_attention(queries[b, n], keys, values, mask, softcap)
        np.testing.assert_allclose(found[b, n], expected, atol=1e-5)


def test_the_softmax_is_safe_from_overflow():
    big = jnp.full((1, 2, 1, 4), 300.0)
    segment = KeyValues(big, jnp.ones((1, 2, 1, 4)))
    found = attend(big, (segment,), (jnp.asarray(CAUSAL[:2, :2])[None],))
    np.testing.assert_allclose(found, 1.0, atol=1e-6)


def test_rotation_makes_products_depend_on_distance_alone():
    random = np.random.default_rng(0)
    a, b = (jnp.asarray(normal(random, 1, 1, 1, 8)) for _ in range(2))

    def product(i, j):
        by = [rotation(jnp.full((1, 1), at), frequencies(8, 10_000.0)) for at in (i, j)]
        return (rotate(a, by[0]) * rotate(b, by[1])).sum()

    assert float(product(3, 7)) == pytest.approx(float(product(13, 17)), abs=1e-5)
    assert float(product(3, 7)) != pytest.approx(float(product(3, 8)), abs=1e-3)


def norm(x, scale, config):
    normal = x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + config.norm_epsilon)
    return normal * (scale + config.norm_offset)


def speeds(config, window):
    """Radians a token turns each pair of a head, pair by pair."""
    theta = config.rope_local_theta if window and config.rope_local_theta else config.rope_theta
    plain = [theta ** (-2 * i / config.head_dim) for i in range(config.head_dim // 2)]
    if theta != config.rope_theta or config.rope_scaling == "none":
        return np.array(plain)
    found = []
    for speed in plain:
        turns = config.rope_original_length * speed / (2 * np.pi)
        low, high = config.rope_low_frequency_factor, config.rope_high_frequency_factor
        kept = 0.0 if config.rope_scaling == "linear" else (turns - low) / (high - low)
        kept = min(max(kept, 0.0), 1.0)
        found.append(kept * speed + (1 - kept) * speed / config.rope_factor)
    return np.array(found)


def turn(x, by):
    """Rotary embedding as a product of complex numbers: [T, heads, head_dim]."""
    half = x.shape[-1] // 2
    angles = np.arange(len(x))[:, None] * by
    turned = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angles)[:, None]
    return np.concatenate([turned.real, turned.imag], axis=-1)


def activated(x, activation):
    if activation == "silu":
        return x / (1 + np.exp(-x))
    return x / 2 * (1 + np.tanh((2 / np.pi) ** 0.5 * (x + 0.044715 * x**3)))


def plain_heads(normed, attention, name, config):
    heads = np.einsum("td,dhk->thk", normed, attention[name]) + attention.get(f"{name}_bias", 0)
    if config.qk_norm and name != "value":
        heads = norm(heads, attention[f"{name}_norm"]["scale"], config)
    return heads


def plain_layer(x, layer, window, config):
    """One layer on one sequence [T, D]."""
    normed = norm(x, layer["pre_attention_layer_norm"]["scale"], config)
    attention, mlp = layer["self_attention"], layer["mlp"]
    query, key, value = (
        plain_heads(normed, attention, name, config) for name in ("query", "key", "value")
    )
    distances = np.arange(len(x))[:, None] - np.arange(len(x))
    mask = (distances >= 0) & (distances < (window or len(x)))
    query, key = (turn(heads, speeds(config, window)) for heads in (query, key))
    softcap, scale = config.attention_softcap, config.attention_scale
    mixed = plain_attention(query, key, value, mask, softcap, scale)
    mixed = np.einsum("thk,hkd->td", mixed, attention["out"])
    if config.post_norms:
        mixed = norm(mixed, layer["post_attention_layer_norm"]["scale"], config)
    x = x + mixed
    normed = norm(x, layer["pre_mlp_layer_norm"]["scale"], config)
    gate = activated(normed @ mlp["wi_0"], config.activation)
    mixed = (gate * (normed @ mlp["wi_1"])) @ mlp["wo"]
    if config.post_norms:
        mixed = norm(mixed, layer["post_mlp_layer_norm"]["scale"], config)
    return x + mixed


def plain_logits(config, params, tokens):
    """The whole network on one sequence, layer by layer in float64."""
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), params["params"])
    x = params["token_embedder"][tokens]
    x = x * config.model_dim**0.5 if config.scaled_embeddings else x
    for index in range(config.num_layers):
        layer = jax.tree.map(lambda p, index=index: p[index], params["layers"])
        window = config.attention_windows[index % len(config.attention_windows)]
        x = plain_layer(x, layer, window, config)
    table = params["token_embedder" if config.tied_embeddings else "logits_dense"]
    logits = norm(x, params["decoder_norm"]["scale"], config) @ table.T
    cap = config.logit_softcap
    return cap * np.tanh(logits / cap) if cap else logits


GEMMA = dict(
    activation="gelu",
    norm_offset=1.0,
    post_norms=True,
    scaled_embeddings=True,
    attention_scale=0.2,
)
KINDS = {
    "plain": dict(),
    "grouped": dict(num_kv_heads=1),
    "ungrouped": dict(num_kv_heads=4),
    "narrow": dict(attention_windows=(1, 6, 2)),
    "untied": dict(tied_embeddings=False, rope_theta=100.0, scan_unroll=3),
    "llama3": dict(
        norm_epsilon=1e-5, rope_scaling="llama3", rope_factor=32.0, rope_original_length=16
    ),
    "qwen2.5": dict(attention_bias=True),
    "qwen3": dict(qk_norm=True),
    "gemma2": GEMMA | dict(attention_windows=(3, 0), attention_softcap=0.5, logit_softcap=1.0),
    "gemma3": GEMMA
    | dict(
        qk_norm=True,
        attention_windows=(3, 3, 0),
        rope_local_theta=50.0,
        rope_scaling="linear",
        rope_factor=8.0,
    ),
}


def make(**changes):
    sizes = dict(vocab_size=30, model_dim=16, num_heads=4, num_kv_heads=2, head_dim=8, mlp_dim=24)
    config = TransformerConfig(**{**sizes, "num_layers": 3, "max_length": 16, **changes})
    model = Transformer(config)
    tokens = jax.ShapeDtypeStruct((1, 2), jnp.int32)
    shapes = jax.eval_shape(
        functools.partial(model.init, method="prefill"), jax.random.key(0), tokens
    )
    leaves, structure = jax.tree.flatten(nn.unbox(shapes))
    random = np.random.default_rng(3)
    leaves = [jnp.asarray(0.25 * normal(random, *leaf.shape)) for leaf in leaves]
    return model, jax.tree.unflatten(structure, leaves)


@pytest.mark.parametrize("kind", KINDS)
def test_reading_in_parts_is_reading_whole_sequences(kind):
    model, params = make(**KINDS[kind])
    random = np.random.default_rng(0)
    prefix, history, own = (
        random.integers(1, 30, shape) for shape in ((PREFIX,), (B, HISTORY), (B, N, OWN))
    )

    @jax.jit
    def in_parts(prefix, history, own):
        def read(tokens, start, segments, masks):
            length = tokens.shape[-1]
            at = start + jnp.arange(length).reshape((1,) * (tokens.ndim - 1) + (-1,))
            return model.apply(
                params,
                tokens,
                jnp.broadcast_to(at, tokens.shape),
                jnp.asarray(CAUSAL[:length, :length]),
                segments,
                masks,
                method="extend",
            )

        _, first = model.apply(params, prefix, method="prefill")
        everywhere = jnp.ones((1, 1), bool)
        _, second = read(history, PREFIX, (first,), (everywhere,))
        hidden, _ = read(own, PREFIX + HISTORY, (first, second), (everywhere, everywhere))
        return model.apply(params, hidden, method="logits")

    found = in_parts(prefix, history, own)
    wholes = [np.concatenate([prefix, history[b], own[b, n]]) for b, n in np.ndindex(B, N)]
    forward = jax.jit(model.apply)(params, jnp.asarray(np.stack(wholes)))
    for (b, n), whole, logits in zip(np.ndindex(B, N), wholes, forward, strict=True):
        expected = plain_logits(model.config, params, whole)
        np.testing.assert_allclose(logits, expected, atol=3e-5)
        np.testing.assert_allclose(found[b, n], expected[-OWN:], atol=3e-5)


def test_a_token_of_a_tree_sees_the_window_of_its_own_path():
    """Two branches in one segment: places in it say nothing, positions do."""
    model, params = make(attention_windows=(2, 0))
    stem, branches = np.array([4, 5, 6]), np.array([[7, 8], [9, 10]])
    tokens = jnp.asarray(branches.T.reshape(-1))  # 7, 9, 8, 10: depth by depth
    ancestors = jnp.asarray([[1, 0, 0, 0], [0, 1, 0, 0], [1, 0, 1, 0], [0, 1, 0, 1]], bool)

    @jax.jit
    def read():
        _, segment = model.apply(params, jnp.asarray(stem), method="prefill")
        hidden, _ = model.apply(
            params,
            tokens,
            jnp.array([3, 3, 4, 4]),
            ancestors,
            (segment,),
            (jnp.ones((1, 1), bool),),
            method="extend",
        )
        return model.apply(params, hidden, method="logits")

    found = np.asarray(read())
    for index, branch in enumerate(branches):
        expected = plain_logits(model.config, params, np.concatenate([stem, branch]))
        np.testing.assert_allclose(found[index::2], expected[-2:], atol=1e-5)

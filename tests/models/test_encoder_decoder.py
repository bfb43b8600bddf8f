"""Encoder–decoders of the T5 family against transformers, and against themselves in other pieces.

Every network is tiny and random, biases and norms too; nothing is downloaded.
"""

import functools
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recexplore.models import config_file, pretrained, saved
from recexplore.models.encoder_decoder import EncoderDecoder, EncoderDecoderConfig
from recexplore.models.relative_positions import buckets_of

_WHY = "needs transformers and torch: pip install -e '.[bench]'"
torch = pytest.importorskip("torch", reason=_WHY)
transformers = pytest.importorskip("transformers", reason=_WHY)

SIZES = dict(
    vocab_size=64,
    d_model=32,
    d_kv=6,  # heads together are narrower than the model
    d_ff=48,
    num_layers=3,
    num_heads=4,
    layer_norm_epsilon=1e-5,
)
GATED = dict(feed_forward_proj="gated-gelu", tie_word_embeddings=False)
NEAR = dict(relative_attention_num_buckets=8, relative_attention_max_distance=12)
MODELS = {  # name: class of the network, and what differs from SIZES
    "t5_1_1": ("T5", GATED),
    "flan_deep_decoder": ("T5", dict(**GATED, **NEAR, num_layers=1, num_decoder_layers=4)),
    "mt5": ("MT5", dict(**NEAR, d_kv=9, num_heads=5, d_ff=20, vocab_size=83)),
    "t5": ("T5", dict(**NEAR, feed_forward_proj="relu")),
    "t5_gated_silu": ("T5", dict(feed_forward_proj="gated-silu", num_layers=1)),
}
EVERY = pytest.mark.parametrize("name", MODELS)
B, S, T, END = 3, 21, 9, 1
_RANDOM = np.random.default_rng(0)
PROMPTS = _RANDOM.integers(2, 64, (B, S))
LENGTHS = np.array([S, 4, 13])
ANSWERS = np.concatenate([np.zeros((B, 1), int), _RANDOM.integers(2, 64, (B, T - 1))], axis=1)


class Theirs(NamedTuple):
    """What transformers saved, and what its network makes of PROMPTS and ANSWERS."""

    folder: Path
    encoded: np.ndarray
    hidden: np.ndarray
    logits: np.ndarray


class Ours(NamedTuple):
    """The same network, read from the folder."""

    config: EncoderDecoderConfig
    model: EncoderDecoder
    params: Any


def ended():
    """PROMPTS with END behind each, and which of their tokens are real."""
    tokens = np.zeros((B, S + 1), int)
    tokens[:, :S] = PROMPTS
    tokens[np.arange(B), LENGTHS] = END
    return tokens, np.arange(S + 1)[None] <= LENGTHS[:, None]


def answer(network):
    """Hidden states of the encoder and the decoder, and logits."""
    tokens, real = ended()
    with torch.no_grad():
        said = network(
            input_ids=torch.tensor(tokens),
            attention_mask=torch.tensor(real, dtype=torch.long),
            decoder_input_ids=torch.tensor(ANSWERS),
            output_hidden_states=True,
        )
    parts = said.encoder_last_hidden_state, said.decoder_hidden_states[-1], said.logits
    return [part.numpy() for part in parts]


@functools.cache
def network_of(name):
    """With an output table of its own, unless the original T5 shares it."""
    kind, differences = MODELS[name]
    config = getattr(transformers, f"{kind}Config")(**{**SIZES, **differences})
    network = getattr(transformers, f"{kind}ForConditionalGeneration")(config)
    if kind == "MT5" or differences.get("tie_word_embeddings") is False:
        network.lm_head.weight = torch.nn.Parameter(network.lm_head.weight.clone())
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(0.0, 0.3, generator=generator)
    return network.eval()


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """By name of MODELS."""

    @functools.cache
    def make(name):
        network, folder = network_of(name), tmp_path_factory.mktemp(name)
        network.save_pretrained(folder)
        return Theirs(folder, *answer(network))

    return make


@pytest.fixture(scope="module")
def ours(theirs):
    """By name of MODELS."""

    @functools.cache
    def read(name):
        folder = theirs(name).folder
        config = config_file.read_config(folder, max_length=64)
        return Ours(config, EncoderDecoder(config), pretrained.load(folder, config))

    return read


@functools.partial(jax.jit, static_argnames=("model", "method", "num_steps"))
def apply(model, params, *args, method=None, **kwargs):
    return model.apply(params, *args, method=method, **kwargs)


@functools.partial(jax.jit, static_argnums=0)
def encoder_of(model, params, tokens, real):
    """Hidden states of the encoder."""
    positions = jnp.arange(tokens.shape[1])[None]

    def hidden(module):
        return module._hidden_of_prompts(tokens, positions, real, True)

    return model.apply(params, method=hidden)


@functools.partial(jax.jit, static_argnums=0)
def decoder_of(model, params, prompts, lengths, answers):
    """Hidden states of the decoder."""

    def hidden(module):
        encoded, real = module._encode_prompts(prompts, lengths, True)
        return module._decode(encoded, real, answers, True)

    return model.apply(params, method=hidden)


@EVERY
def test_hidden_states_and_logits_are_those_of_transformers(name, theirs, ours):
    _, wanted, hidden, logits = theirs(name)
    config, model, params = ours(name)
    tokens, real = ended()
    encoded = encoder_of(model, params, tokens, real)
    np.testing.assert_allclose(encoded[real], wanted[real], atol=1e-4)
    found = decoder_of(model, params, PROMPTS, LENGTHS, ANSWERS)
    np.testing.assert_allclose(found, hidden, atol=1e-4)
    found = apply(model, params, PROMPTS, LENGTHS, ANSWERS)
    np.testing.assert_allclose(found, logits, atol=1e-4)
    shapes = jax.tree.map(lambda x: (x.shape, x.dtype), params)
    assert shapes == jax.tree.map(
        lambda x: (x.shape, x.dtype), saved.abstract_parameters(EncoderDecoder(config))
    )


@EVERY
def test_what_is_exported_has_the_same_logits_in_transformers(name, theirs, ours, tmp_path):
    config, _, params = ours(name)
    pretrained.save(tmp_path / "copy", params, config, shard_bytes=30_000)
    read, report = transformers.AutoModelForSeq2SeqLM.from_pretrained(
        tmp_path / "copy", output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"]
    np.testing.assert_allclose(answer(read.eval())[2], theirs(name).logits, atol=1e-4)
    assert config_file.read_config(tmp_path / "copy", max_length=64) == config


@pytest.mark.parametrize(
    ("num_buckets", "max_distance"), [(32, 128), (8, 16), (16, 20), (6, 50), (4, 9), (12, 100)]
)
@pytest.mark.parametrize("both_ways", [True, False])
def test_buckets_are_those_of_transformers(num_buckets, max_distance, both_ways):
    from transformers.models.t5.modeling_t5 import T5Attention

    distances = np.arange(-300, 301)
    wanted = T5Attention._relative_position_bucket(
        torch.tensor(distances), both_ways, num_buckets, max_distance
    )
    found = buckets_of(jnp.asarray(distances), num_buckets, max_distance, both_ways)
    np.testing.assert_array_equal(found, wanted)


def make(**changes):
    """A network with random parameters, biases of positions as large as anything else."""
    sizes = dict(vocab_size=64, model_dim=16, num_heads=2, head_dim=6, mlp_dim=20, max_length=64)
    sizes |= dict(num_encoder_layers=2, num_decoder_layers=3, num_buckets=8, max_distance=10)
    config = EncoderDecoderConfig(**{**sizes, **changes})
    model, random = EncoderDecoder(config), np.random.default_rng(1)
    shapes = saved.abstract_parameters(model)
    return model, jax.tree.map(
        lambda x: jnp.asarray(random.normal(0, 0.3, x.shape), x.dtype), shapes
    )


VARIANTS = pytest.mark.parametrize(
    "changes",
    [
        {},
        {"bias_by_layer": True},
        {"end_id": -1, "start_id": 5, "activation": "relu"},
        {"num_decoder_layers": 1, "tied_embeddings": True},
    ],
    ids=str,
)


def whole_passes(model, params, prompts, lengths, answers):
    """Hidden states after each of the answers' tokens [B, N, T, D], one whole pass an answer."""
    start = model.config.start_id
    begun = np.pad(answers, ((0, 0), (0, 0), (1, 0)), constant_values=start)
    passes = [
        decoder_of(model, params, prompts, lengths, begun[:, n]) for n in range(answers.shape[1])
    ]
    return np.stack(passes, axis=1)


def read(model, params, prefix, padding, prompts, lengths):
    """Prompts, of which the prefix was handed over apart, with some padding."""
    tokens = jnp.asarray(np.pad(prefix, (0, padding), constant_values=9))
    length = jnp.int32(len(prefix)) if padding else None
    begun = apply(model, params, tokens, length, method="read_prefix")
    rest, wanted = prompts[:, len(prefix) :], lengths - len(prefix)
    return apply(model, params, begun, rest, wanted, method="read_prompts")


@VARIANTS
def test_answers_share_what_is_read_once_and_are_those_of_whole_passes(changes):
    model, params = make(**changes)
    prompts, num = PROMPTS.copy(), 4
    prompts[:, :2] = [7, 3]
    answers = _RANDOM.integers(2, 64, (B, num, T))
    wanted = whole_passes(model, params, prompts, LENGTHS, answers)
    context = read(model, params, [7, 3], 3, prompts, LENGTHS)
    assert all(x.shape[1] == B for segment in context.segments for x in segment[:2])
    np.testing.assert_allclose(context.last, wanted[:, 0, 0], atol=1e-5)
    masks = context.masks_for(2)
    steps = context.lengths[:, None, None] + np.arange(T)[None, None]
    positions = jnp.broadcast_to(steps, answers.shape)
    causal = jnp.tril(jnp.ones((T, T), bool))[None, None]
    at_once, _ = apply(
        model, params, answers, positions, causal, context.segments, masks, method="extend"
    )
    np.testing.assert_allclose(at_once, wanted[:, :, 1:], atol=1e-5)
    places = _RANDOM.integers(0, T, (B, num, 2))
    some, own = apply(
        model,
        params,
        answers,
        positions,
        causal,
        context.segments,
        masks,
        read_at=jnp.asarray(places),
        method="extend",
    )
    picked = np.take_along_axis(np.asarray(at_once), places[..., None], axis=2)
    np.testing.assert_allclose(some, picked, atol=1e-5)
    assert own.keys.shape[:4] == (model.config.num_decoder_layers, B, num, T)


@VARIANTS
def test_decoding_token_by_token_is_the_whole_pass(changes):
    model, params = make(**changes)
    prompts = PROMPTS.copy()
    prompts[:, :1] = 7
    answers = _RANDOM.integers(2, 64, (B, 1, T))
    wanted = whole_passes(model, params, prompts, LENGTHS, answers)[:, 0]
    context = read(model, params, [7], 0, prompts, LENGTHS)
    segments, masks, itself = context.segments, context.masks, jnp.ones((1, 1, 1), bool)
    for step in range(4):
        hidden, own = apply(
            model,
            params,
            jnp.asarray(answers[:, 0, step : step + 1]),
            (context.lengths + step)[:, None],
            itself,
            segments,
            masks,
            method="extend",
        )
        np.testing.assert_allclose(hidden[:, 0], wanted[:, step + 1], atol=1e-5)
        segments, masks = (*segments, own), (*masks, itself)


@VARIANTS
def test_training_reads_answers_in_place(changes):
    """Rows of prompt and answer, one behind the other."""
    model, params = make(**changes)
    rows = np.zeros((B, S + T), int)
    answers = _RANDOM.integers(2, 64, (B, 1, T))
    for row, length in enumerate(LENGTHS):
        rows[row, :length] = PROMPTS[row, :length]
        rows[row, length : length + T] = answers[row, 0]
    found = apply(model, params, rows, LENGTHS, num_steps=T, method="answer_states")
    wanted = whole_passes(model, params, PROMPTS, LENGTHS, answers)[:, 0]
    np.testing.assert_allclose(found, wanted, atol=1e-5)

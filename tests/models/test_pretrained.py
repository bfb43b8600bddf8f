"""Hugging Face folders against transformers itself: the same logits in and out, and what is refused.

Every network is tiny and random, biases and norms too; nothing is downloaded.
"""

import dataclasses
import functools
import json
import re
import shutil

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from recexplore.distributed.partitioning import DEFAULT_RULES, make_mesh, shardings_of
from recexplore.errors import InputError
from recexplore.models import pretrained
from recexplore.models.transformer import Transformer, TransformerConfig

_WHY = "needs transformers and torch: pip install -e '.[bench]'"
torch = pytest.importorskip("torch", reason=_WHY)
transformers = pytest.importorskip("transformers", reason=_WHY)

SIZES = dict(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=6,  # heads together are narrower than the model
    max_position_embeddings=64,
    rms_norm_eps=1e-5,
)
GEMMA = dict(sliding_window=4, query_pre_attn_scalar=11, final_logit_softcapping=3.0)
WINDOWS = ["sliding_attention", "full_attention", "sliding_attention"]
LLAMA3 = dict(
    rope_type="llama3",
    rope_theta=100.0,
    factor=4.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=16,
)
MODELS = {  # name: class of the configuration, and what differs from SIZES
    "llama": ("LlamaConfig", {}),
    "llama_stretched": ("LlamaConfig", dict(rope_parameters=LLAMA3, tie_word_embeddings=True)),
    "qwen2": ("Qwen2Config", {}),
    "qwen2_windows": (
        "Qwen2Config",
        dict(
            use_sliding_window=True, sliding_window=4, max_window_layers=1, tie_word_embeddings=True
        ),
    ),
    "qwen3": (
        "Qwen3Config",
        dict(rope_parameters=dict(rope_type="linear", factor=2.0, rope_theta=1e3)),
    ),
    "qwen3_tied": ("Qwen3Config", dict(tie_word_embeddings=True, hidden_act="gelu_pytorch_tanh")),
    "gemma2": ("Gemma2Config", dict(**GEMMA, attn_logit_softcapping=2.0)),
    "gemma2_untied": ("Gemma2Config", dict(**GEMMA, tie_word_embeddings=False)),
    "gemma3": (
        "Gemma3TextConfig",
        dict(
            **GEMMA,
            layer_types=WINDOWS,
            rope_parameters=dict(
                full_attention=dict(rope_type="linear", factor=4.0, rope_theta=1e3),
                sliding_attention=dict(rope_type="default", rope_theta=10.0),
            ),
        ),
    ),
}
TOKENS = np.random.default_rng(0).integers(1, 64, (2, 14))


def randomised(model):
    """All parameters, which transformers starts at one and zero in part, at random."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.3, generator=generator)
    return model.eval()


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """By name: the folder that transformers saved, in several files, and its logits."""

    @functools.cache
    def make(name, dtype="float32"):
        kind, changes = MODELS[name]
        config = getattr(transformers, kind)(**{**SIZES, **changes})
        config._attn_implementation = "eager"
        model = randomised(transformers.AutoModelForCausalLM.from_config(config))
        model = model.to(getattr(torch, dtype))
        folder = tmp_path_factory.mktemp(name)
        model.save_pretrained(folder, max_shard_size="20KB")
        assert len([*folder.glob("*.safetensors")]) > 1
        return folder, logits_of(model)

    return make


def logits_of(model):
    with torch.no_grad():
        return model(torch.tensor(TOKENS)).logits.float().numpy()


@functools.partial(jax.jit, static_argnums=0)
def apply(config, params, tokens):
    return Transformer(config).apply(params, tokens)


@pytest.mark.parametrize("name", MODELS)
def test_the_logits_are_those_of_transformers(name, published):
    folder, wanted = published(name)
    config = pretrained.read_config(folder, max_length=32)
    params = pretrained.load(folder, config)
    np.testing.assert_allclose(apply(config, params, TOKENS), wanted, atol=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_what_is_exported_has_the_same_logits_in_transformers(name, published, tmp_path):
    folder, wanted = published(name)
    config = pretrained.read_config(folder, max_length=32)
    params = pretrained.load(folder, config)
    copy = tmp_path / "made" / "copy"
    pretrained.save(copy, params, config, shard_bytes=30_000)
    assert len([*copy.glob("*.safetensors")]) > 1
    assert [*copy.parent.iterdir()] == [copy]
    read, report = transformers.AutoModelForCausalLM.from_pretrained(
        copy, attn_implementation="eager", output_loading_info=True
    )
    assert not any(report.values())
    np.testing.assert_allclose(logits_of(read.eval()), wanted, atol=1e-4)
    assert pretrained.read_config(copy, max_length=32) == config
    index = json.loads((copy / "model.safetensors.index.json").read_text())
    tensors = jax.tree.leaves(params)
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in tensors)

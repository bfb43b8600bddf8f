"""Hugging Face folders against transformers: the same logits in and out.

Every network is tiny and random, biases and norms too; nothing is downloaded.
"""

import dataclasses
import functools
import json
import shutil
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from recexplore.distributed.partitioning import DEFAULT_RULES, make_mesh, shardings_of
from recexplore.models import config_file, pretrained, saved
from recexplore.models.transformer import Transformer

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


class Published(NamedTuple):
    """What transformers saved, and what it says to TOKENS."""

    folder: Path
    logits: np.ndarray


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """By name of MODELS."""

    @functools.cache
    def make(name, **changes):
        kind, differences = MODELS[name]
        config = getattr(transformers, kind)(**{**SIZES, **differences, **changes})
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
        folder = tmp_path_factory.mktemp(name)
        randomised(model).save_pretrained(folder, max_shard_size="20KB")
        assert len([*folder.glob("*.safetensors")]) > 1
        return Published(folder, logits_of(model))

    return make


@pytest.fixture(scope="module")
def imported(published):
    """By name of MODELS: the configuration and the parameters."""

    @functools.cache
    def read(name):
        folder, _ = published(name)
        config = config_file.read_config(folder, max_length=32)
        return config, pretrained.load(folder, config)

    return read


def logits_of(model):
    with torch.no_grad():
        return model(torch.tensor(TOKENS)).logits.float().numpy()


def ours(config, params):
    return jax.jit(Transformer(config).apply)(params, TOKENS)


@pytest.mark.parametrize("name", MODELS)
def test_the_logits_are_those_of_transformers(name, published, imported):
    config, params = imported(name)
    np.testing.assert_allclose(ours(config, params), published(name).logits, atol=1e-4)
    wanted = saved.abstract_parameters(Transformer(config))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), params) == jax.tree.map(
        lambda x: (x.shape, x.dtype), wanted
    )


@pytest.mark.parametrize("name", MODELS)
def test_what_is_exported_has_the_same_logits_in_transformers(name, published, imported, tmp_path):
    config, params = imported(name)
    copy = tmp_path / "made" / "copy"
    pretrained.save(copy, params, config, shard_bytes=30_000)
    assert [*copy.parent.iterdir()] == [copy]
    read, report = transformers.AutoModelForCausalLM.from_pretrained(
        copy, attn_implementation="eager", output_loading_info=True
    )
    assert not any(report.values())
    np.testing.assert_allclose(logits_of(read.eval()), published(name).logits, atol=1e-4)
    assert config_file.read_config(copy, max_length=32) == config
    index = json.loads((copy / "model.safetensors.index.json").read_text())
    assert len({*index["weight_map"].values()}) > 1
    total = sum(array.nbytes for array in jax.tree.leaves(params))
    assert index["metadata"]["total_size"] == total


def test_the_language_model_of_a_folder_with_pictures_is_read(published, tmp_path):
    folder, logits = published("gemma3")
    text = json.loads((folder / "config.json").read_text())
    outer = {"model_type": "gemma3", "text_config": text, "vision_config": {"hidden_size": 8}}
    (tmp_path / "config.json").write_text(json.dumps(outer))
    tensors = tensors_of(folder)
    for start in ("language_model.model.", "model.language_model."):  # before transformers 5; since
        renamed = {start + name.removeprefix("model."): value for name, value in tensors.items()}
        renamed["vision_tower.weight"] = np.ones((2, 2), np.float32)
        save_file(renamed, tmp_path / "model.safetensors")
        config = config_file.read_config(tmp_path, max_length=16)
        found = ours(config, pretrained.load(tmp_path, config))
        np.testing.assert_allclose(found, logits, atol=1e-4)


@pytest.mark.parametrize("name", ["qwen2", "gemma3"])
def test_a_mesh_gets_the_same_arrays_in_its_own_pieces(name, published, imported):
    config, params = imported(name)
    config = dataclasses.replace(config, lora_rank=2)  # adapters have shardings, but no tensors
    mesh = make_mesh(2, 2, 2)
    boxed = jax.eval_shape(lambda: Transformer(config).init(jax.random.key(0), jnp.asarray(TOKENS)))
    # With the head's width cut too, pieces aren't whole stretches of rows in the files.
    rules = [(axis, "data" if axis == "kv" else target) for axis, target in DEFAULT_RULES]
    shardings = shardings_of(boxed, mesh, rules)
    spread = pretrained.load(published(name).folder, config, shardings)
    jax.tree.map(np.testing.assert_array_equal, spread, params)
    assert jax.tree.map(lambda x: x.sharding, spread["params"]) == shardings["params"]
    query = spread["params"]["layers"]["self_attention"]["query"]
    assert query.addressable_shards[0].data.shape == (3, 16, 2, 3)


@pytest.mark.parametrize("stored", [ml_dtypes.bfloat16, np.float16])
@pytest.mark.parametrize("wanted", ["float32", "bfloat16"])
def test_half_precision_files(stored, wanted, published, imported, tmp_path):
    folder, _ = published("qwen2")
    shutil.copyfile(folder / "config.json", tmp_path / "config.json")
    rounded = {name: value.astype(stored) for name, value in tensors_of(folder).items()}
    save_file(rounded, tmp_path / "model.safetensors")
    config = config_file.read_config(tmp_path, max_length=16, param_dtype=wanted)
    found = pretrained.load(tmp_path, config)
    _, params = imported("qwen2")
    expected = jax.tree.map(lambda x: np.asarray(x).astype(stored).astype(wanted), params)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    assert {x.dtype for x in jax.tree.leaves(found)} == {jnp.dtype(wanted)}
    pretrained.save(tmp_path / "copy", found, config)
    again = tensors_of(tmp_path / "copy")
    assert {x.dtype for x in again.values()} == {jnp.dtype(wanted)}
    for name, value in again.items():
        np.testing.assert_array_equal(value, rounded[name].astype(wanted))


@pytest.mark.parametrize("name", ["llama_stretched", "gemma3", "qwen2_windows"])
def test_the_spelling_before_transformers_5_says_the_same(name, published, tmp_path):
    folder, _ = published(name)
    entries = json.loads((folder / "config.json").read_text())
    rope = entries.pop("rope_parameters")
    entries.pop("layer_types", None)
    if name == "gemma3":
        entries |= {"sliding_window_pattern": 2, "rope_local_base_freq": 10.0}
        rope = rope["full_attention"]
    entries["rope_theta"] = rope.pop("rope_theta")
    if rope["rope_type"] != "default":
        entries["rope_scaling"] = {"type": rope.pop("rope_type"), **rope}
    (tmp_path / "config.json").write_text(json.dumps(entries))
    old, new = (config_file.read_config(path, max_length=16) for path in (tmp_path, folder))
    assert old == new


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_a_folder_says_of_tokens_and_context_what_it_was_told(name, published, tmp_path):
    """transformers would fill in the ids of the family's first model."""
    folder, _ = published(name)
    config = config_file.read_config(folder, max_length=16)
    params = pretrained.load(folder, config)

    def read(**said):
        pretrained.save(tmp_path / "copy", params, config, **said)
        found = transformers.AutoConfig.from_pretrained(tmp_path / "copy")
        return (
            *(found.bos_token_id, found.eos_token_id, found.pad_token_id),
            found.max_position_embeddings,
        )

    assert read() == (None, None, None, 16)
    ids = {"bos_token_id": 7, "eos_token_id": 8}
    assert read(token_ids=ids, context_length=48) == (7, 8, None, 48)


GEMMA2_9B = dict(
    **dict(attention_bias=False, attention_dropout=0.0, attn_logit_softcapping=50.0),
    **dict(cache_implementation="hybrid", final_logit_softcapping=30.0, head_dim=256),
    **dict(hidden_act="gelu_pytorch_tanh", hidden_activation="gelu_pytorch_tanh"),
    **dict(hidden_size=3584, intermediate_size=14336, max_position_embeddings=8192),
    **dict(model_type="gemma2", num_attention_heads=16, num_hidden_layers=42, pad_token_id=0),
    **dict(num_key_value_heads=8, query_pre_attn_scalar=256, rms_norm_eps=1e-06, vocab_size=256000),
    **dict(rope_theta=10000.0, sliding_window=4096, sliding_window_size=4096, use_cache=True),
)
GEMMA3_4B = dict(
    **dict(model_type="gemma3", boi_token_index=255999, eoi_token_index=256000),
    **dict(image_token_index=262144, mm_tokens_per_image=256, vision_config={"hidden_size": 1152}),
    text_config=dict(
        **dict(hidden_size=2560, intermediate_size=10240, model_type="gemma3_text"),
        **dict(num_hidden_layers=34, sliding_window=1024),
        rope_scaling=dict(factor=8.0, rope_type="linear"),
    ),
)
LLAMA2_7B = dict(
    **dict(hidden_act="silu", hidden_size=4096, intermediate_size=11008, rope_scaling=None),
    **dict(max_position_embeddings=4096, model_type="llama", num_attention_heads=32),
    **dict(num_hidden_layers=32, rms_norm_eps=1e-05, vocab_size=32000, torch_dtype="float16"),
)


@pytest.mark.parametrize(
    ("entries", "wanted"),
    [
        (LLAMA2_7B, dict(head_dim=128, num_kv_heads=32, rope_theta=1e4, tied_embeddings=False)),
        (
            GEMMA2_9B,
            dict(attention_windows=(4096, 0), attention_scale=0.0, tied_embeddings=True),
        ),
        (
            GEMMA3_4B,
            dict(
                **dict(vocab_size=262_208, num_heads=8, num_kv_heads=4, head_dim=256),
                **dict(attention_windows=(1024,) * 5 + (0,), rope_scaling="linear"),
                **dict(rope_factor=8.0, rope_theta=1e6, rope_local_theta=1e4),
            ),
        ),
    ],
)
def test_what_older_folders_leave_out_is_known(entries, wanted, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(entries))
    config = config_file.read_config(tmp_path, max_length=2048)
    assert {field: getattr(config, field) for field in wanted} == wanted


def tensors_of(folder):
    found = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="np") as opened:
            found |= {name: opened.get_tensor(name) for name in opened.keys()}
    return found

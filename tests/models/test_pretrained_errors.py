"""What is refused of Hugging Face folders, coming in and going out, and in which words."""

import dataclasses
import functools
import json
import os
import re
import shutil

import jax
import numpy as np
import pytest
from flax.traverse_util import unflatten_dict
from safetensors import safe_open
from safetensors.numpy import save_file

from recexplore.errors import InputError
from recexplore.models import config_file, families, pretrained
from recexplore.models.tensor_names import axis_sizes, tensor_names
from recexplore.models.transformer import TransformerConfig

SIZES = dict(vocab_size=64, num_layers=3, model_dim=8, num_heads=4, num_kv_heads=2, head_dim=6)
GEMMA = dict(norm_offset=1.0, post_norms=True, scaled_embeddings=True, attention_scale=11**-0.5)
NETWORKS = {
    "llama": {"tied_embeddings": False},
    "llama_tied": {},
    "qwen2": {"attention_bias": True},
    "qwen3": {"qk_norm": True},
    "gemma2": {**GEMMA, "attention_windows": (4, 0)},
    "gemma3": {**GEMMA, "qk_norm": True, "attention_windows": (4, 0), "rope_local_theta": 10.0},
}
WINDOWS = ["sliding_attention", "full_attention", "sliding_attention"]
NORM = "model.norm.weight"
QUERY = "model.layers.1.self_attn.q_proj.weight"
INDEX = "model.safetensors.index.json"


def small(**changes):
    return TransformerConfig(**{**SIZES, "mlp_dim": 12, "max_length": 64, **changes})


def random_parameters(config):
    """By the table of names, whose shapes tests/models/test_pretrained.py checks."""
    random, sizes = np.random.default_rng(0), axis_sizes(config)
    params = {}
    table = tensor_names(families.family_of(config), config.tied_embeddings)
    for path, tensor in table.items():
        layers = [config.num_layers] if tensor.in_layers else []
        shape = (*layers, *(sizes[axis] for axis in tensor.kept))
        params[path] = random.normal(size=shape).astype(np.float32)
    return {"params": unflatten_dict(params, sep="/")}


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """By name of NETWORKS: a folder of several files."""

    @functools.cache
    def make(name):
        folder, config = tmp_path_factory.mktemp("models") / name, small(**NETWORKS[name])
        pretrained.save(folder, random_parameters(config), config, shard_bytes=3_000)
        assert len([*folder.glob("*.safetensors")]) > 1
        return folder

    return make


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_tensors(folder, **changes):
    """Gives the file that has a tensor another in its stead; None removes it."""
    index = json.loads((folder / INDEX).read_text())
    for name, value in changes.items():
        file = folder / index["weight_map"].get(name, index["weight_map"][NORM])
        with safe_open(file, framework="np") as opened:
            tensors = {key: opened.get_tensor(key) for key in opened.keys()}
        tensors[name] = value
        save_file({key: x for key, x in tensors.items() if x is not None}, file)


def first_file(folder):
    return min(folder.glob("*.safetensors"))


def truncate(folder):
    content = first_file(folder).read_bytes()
    first_file(folder).write_bytes(content[:-100])


def overwrite_header(folder):
    content = first_file(folder).read_bytes()
    first_file(folder).write_bytes(content[:8] + b"#" * 20 + content[28:])


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        (
            "llama",
            lambda f: first_file(f).unlink(),
            r"00001-of-\d+.safetensors is missing; .*index",
        ),
        ("llama", truncate, r"00001-of-\d+.safetensors is damaged or not whole"),
        ("llama", overwrite_header, r"00001-of-\d+.safetensors is damaged or not whole"),
        (
            "llama",
            lambda f: (f / INDEX).write_text('{"weight_map": 1}'),
            "index.json can't be read as an index",
        ),
        (
            "llama",
            lambda f: (f / INDEX).unlink(),
            "neither model.safetensors nor model.safetensors.index.json",
        ),
        (
            "llama",
            lambda f: edit_tensors(f, **{NORM: None}),
            r"safetensors lacks the tensor model.norm.weight, which .*index.json says",
        ),
        (
            "llama",
            lambda f: edit_tensors(f, **{QUERY: np.ones((24, 7), np.float32)}),
            rf"safetensors: {QUERY} has shape \(24, 7\), but .* make it \(24, 8\)",
        ),
        (
            "llama",
            lambda f: edit_tensors(f, **{NORM: np.ones(32, np.int8)}),
            "model.norm.weight is stored as I8; supported are F32, F16, BF16",
        ),
        (
            "llama",
            lambda f: edit_tensors(f, **{"score.weight": np.ones(32, np.float32)}),
            "has tensors that the network of config.json doesn't: score.weight",
        ),
        (
            "llama",
            lambda f: edit_config(f, num_hidden_layers=2),
            "doesn't: model.layers.2.input_layernorm.weight, .* …",
        ),
        (
            "llama",
            lambda f: edit_config(f, num_hidden_layers=4),
            r"lacks 9 of 39 tensors: model.layers.3.",
        ),
        (
            "llama_tied",
            lambda f: edit_config(f, tie_word_embeddings=False),
            "lacks the tensor lm_head.weight, so its embeddings are tied, .*tied_embeddings is Fal",
        ),
        (
            "llama",
            lambda f: edit_config(f, tie_word_embeddings=True),
            "lm_head.weight isn't model.embed_tokens.weight, but .*tied_embeddings is True",
        ),
        (
            "llama",
            lambda f: (f / "config.json").unlink(),
            "config.json is missing. .*this computer",
        ),
        ("llama", lambda f: (f / "config.json").write_text("{"), "can't be read as JSON"),
        ("llama", lambda f: edit_config(f, vocab_size="many"), "has vocab_size 'many'"),
        (
            "llama",
            lambda f: edit_config(f, model_type="mamba"),
            "config.json has model_type 'mamba', .* Supported are: llama, qwen2, .*gemma3",
        ),
        ("qwen3", lambda f: edit_config(f, model_type="qwen3_moe"), "model_type 'qwen3_moe'"),
        (
            "qwen3",
            lambda f: edit_config(f, num_experts=8),
            "num_experts 8; recexplore doesn't know",
        ),
        ("llama", lambda f: edit_config(f, quantization_config={"bits": 4}), "quantization_config"),
        ("llama", lambda f: edit_config(f, mlp_bias=True), "has mlp_bias True; the network has no"),
        ("qwen3", lambda f: edit_config(f, attention_bias=True), "has attention_bias True"),
        ("gemma3", lambda f: edit_config(f, use_bidirectional_attention=True), "use_bidirectional"),
        ("gemma3", lambda f: edit_config(f, attn_logit_softcapping=50.0), "attn_logit_softcapping"),
        ("llama", lambda f: edit_config(f, hidden_act="gelu"), "has hidden_act 'gelu'; supported"),
        ("llama", lambda f: edit_config(f, sliding_window=8), "has sliding_window 8; .* llama"),
        ("qwen2", lambda f: edit_config(f, layer_types=WINDOWS), "use_sliding_window False; but"),
        ("gemma2", lambda f: edit_config(f, layer_types=["chunked_attention"] * 3), "layer_types"),
        (
            "llama",
            lambda f: edit_config(f, rope_parameters={"rope_type": "yarn", "factor": 2.0}),
            "has rope_parameters of rope_type 'yarn', which isn't supported",
        ),
        (
            "llama",
            lambda f: edit_config(f, rope_parameters={"partial_rotary_factor": 0.5}),
            "of which not everything is supported",
        ),
        (
            "llama",
            lambda f: edit_config(f, rope_scaling={"type": "linear", "factor": 2.0}),
            "rope_scaling .* and rope_parameters .* different things",
        ),
        (
            "llama",
            lambda f: edit_config(f, rope_parameters={"rope_type": "linear"}),
            "has factor None for its rotary positions",
        ),
        ("llama", lambda f: edit_config(f, max_position_embeddings=8), "max_length is 16, but"),
    ],
)
def test_what_is_wrong_with_a_folder_is_named(name, damage, message, exported, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(exported(name), folder)
    damage(folder)
    with pytest.raises(InputError, match=message) as raised:
        pretrained.load(folder, config_file.read_config(folder, max_length=16))
    assert str(folder) in str(raised.value)


@pytest.mark.parametrize(
    ("changes", "messages"),
    [
        ({"num_layers": 2}, ["TransformerConfig.num_layers is 2, but ", "config.json has 3"]),
        ({"vocab_size": 60}, ["vocab_size is 60, but ", "has 64", "rows of the embedding table"]),
        (
            {"rope_theta": 5.0, "attention_windows": (0, 4)},
            ["rope_theta is 5.0, but ", "attention_windows is (0, 4), but ", "has (4, 0)"],
        ),
        ({"attention_scale": 6**-0.5}, ["attention_scale is 0.408", "has 0.301"]),
        ({"tied_embeddings": False}, ["tied_embeddings is False", "(tie_word_embeddings)"]),
        ({"max_length": 65}, ["max_length is 65, but", "max_position_embeddings 64"]),
    ],
)
def test_a_configuration_that_is_not_the_folders_is_told_so(changes, messages, exported):
    folder = exported("gemma2")
    config = config_file.read_config(folder, max_length=16, dropout_rate=0.1)
    config_file.check_config(folder, config)
    with pytest.raises(InputError) as raised:
        pretrained.load(folder, dataclasses.replace(config, **changes))
    assert all(message in str(raised.value) for message in messages), raised.value


def test_what_the_folder_decides_cannot_be_set(exported):
    with pytest.raises(InputError, match="got num_layers; settings are .*dropout_rate"):
        config_file.read_config(exported("llama"), 16, num_layers=1)


def test_windows_that_mean_the_same_are_the_same(exported):
    folder = exported("gemma2")
    config = config_file.read_config(folder, max_length=16)
    assert config.attention_windows == (4, 0)
    config_file.check_config(folder, dataclasses.replace(config, attention_windows=(4, 0, 4)))


@pytest.mark.parametrize(
    "changes",
    [
        *NETWORKS.values(),
        {**NETWORKS["gemma3"], "rope_local_theta": 0.0},
        {**NETWORKS["gemma3"], "rope_local_theta": 0.0, "rope_scaling": "llama3"},
        {**NETWORKS["gemma3"], "attention_windows": (0,)},
        {**NETWORKS["qwen2"], "attention_windows": (0, 0, 4)},
    ],
)
def test_an_exported_configuration_is_that_of_its_folder(changes, tmp_path):
    config = small(**changes)
    pretrained.save(tmp_path / "model", random_parameters(config), config)
    config_file.check_config(tmp_path / "model", config)
    again = pretrained.load(tmp_path / "model", config)
    jax.tree.map(np.testing.assert_array_equal, again, random_parameters(config))


@pytest.mark.parametrize(
    ("changes", "family"),
    [
        ({}, "llama"),
        ({"activation": "gelu", "rope_scaling": "llama3"}, "llama"),
        ({"attention_bias": True, "attention_windows": (0, 4)}, "qwen2"),
        ({"qk_norm": True, "attention_scale": 6**-0.5}, "qwen3"),
        ({**GEMMA, "attention_softcap": 5.0}, "gemma2"),
        ({**GEMMA, "qk_norm": True, "rope_local_theta": 10.0}, "gemma3_text"),
    ],
)
def test_the_family_is_told_from_the_configuration(changes, family):
    assert families.family_of(small(**changes)) == family


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"post_norms": True}, "post_norms"),
        ({"norm_offset": 0.5}, "norm_offset"),
        ({"attention_windows": (4,)}, "attention_windows"),
        ({"attention_bias": True, "attention_windows": (4, 2)}, "attention_windows"),
        ({"attention_bias": True, "qk_norm": True}, "attention_bias"),
        ({"logit_softcap": 3.0}, "logit_softcap"),
        ({"attention_scale": 0.3}, "attention_scale"),
        ({**GEMMA, "attention_scale": 0.3}, "attention_scale"),
        ({**GEMMA, "post_norms": False}, "post_norms"),
        ({**GEMMA, "qk_norm": True, "attention_softcap": 1.0}, "attention_softcap"),
        ({"num_heads": 3, "num_kv_heads": 3}, "model_dim"),
        ({"lora_rank": 2}, "lora_rank"),
    ],
)
def test_a_network_that_transformers_lacks_is_not_exported(changes, field, tmp_path):
    config = small(**changes)
    value = re.escape(repr(getattr(config, field)))
    with pytest.raises(InputError, match=f"TransformerConfig.{field} is {value}, but it must be"):
        pretrained.save(tmp_path / "model", {"params": {}}, config)
    assert not [*tmp_path.iterdir()]


def test_a_context_that_is_shorter_than_a_training_row_is_refused(tmp_path):
    with pytest.raises(InputError, match="length to export is 7, but .*max_length is 64 already"):
        pretrained.save(tmp_path / "model", {"params": {}}, small(), context_length=7)


@pytest.mark.parametrize("umask", [0o022, 0o027])
def test_an_export_can_be_read_by_whom_any_file_can(umask, tmp_path):
    config, before = small(), os.umask(umask)
    try:
        pretrained.save(
            tmp_path / "model",
            random_parameters(config),
            config,
            shard_bytes=3_000,
            beside={"tokenizer.json": b"{}"},
        )
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "model").iterdir()}
    assert len(modes) > 4
    assert modes == dict.fromkeys(modes, 0o666 & ~umask)


def test_exporting_replaces_an_export_and_nothing_else(tmp_path):
    config = small()
    params = random_parameters(config)
    model, words = tmp_path / "model", tmp_path / "tokenizer.json"
    words.write_text("{}")
    pretrained.save(model, params, config)
    pretrained.save(model, params, config, [words])
    names = {path.name for path in model.iterdir()}
    assert names == {"config.json", "model.safetensors", "tokenizer.json"}
    (model / "config.json").unlink()
    with pytest.raises(InputError, match="holds something that isn't a model"):
        pretrained.save(model, params, config)
    with pytest.raises(
        InputError, match="vocab.txt, a file of the tokenizer to export, is missing"
    ):
        pretrained.save(tmp_path / "other", params, config, [tmp_path / "vocab.txt"])
    with pytest.raises(InputError, match="export writes its own"):
        pretrained.save(tmp_path / "other", params, config, [model / "model.safetensors"])
    with pytest.raises(InputError, match="token_embedder to export has shape"):
        pretrained.save(tmp_path / "other", params, dataclasses.replace(config, vocab_size=63))
    with pytest.raises(InputError, match="lora is in one of them only"):
        pretrained.save(tmp_path / "other", {**params, "lora": {}}, config)
    with pytest.raises(InputError, match="layers/self_attention/key_bias, .* only"):
        pretrained.save(
            tmp_path / "other", params, dataclasses.replace(config, attention_bias=True)
        )
    assert {path.name for path in tmp_path.iterdir()} == {"model", "tokenizer.json"}

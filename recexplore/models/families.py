"""The architectures of transformers that the network covers, and what is written for each."""

import math
from typing import Any, NamedTuple

from recexplore.errors import InputError
from recexplore.models import rope_spellings, t5_config_file
from recexplore.models.networks import Config
from recexplore.models.transformer import TransformerConfig

FULL, SLIDING = "full_attention", "sliding_attention"
ACTIVATIONS = {"silu": "silu", "gelu_pytorch_tanh": "gelu"}
SIZES = {  # field of TransformerConfig → key of config.json
    "vocab_size": "vocab_size",
    "num_layers": "num_hidden_layers",
    "model_dim": "hidden_size",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "mlp_dim": "intermediate_size",
}
KEYS = {**SIZES, "norm_epsilon": "rms_norm_eps", "tied_embeddings": "tie_word_embeddings"}
_LAYER_KEYS = ("sliding_window", "layer_types")
_QWEN_KEYS = ("hidden_act", *_LAYER_KEYS, "use_sliding_window", "max_window_layers")
_GEMMA_KEYS = (
    *("hidden_activation", *_LAYER_KEYS, "query_pre_attn_scalar"),
    *("attn_logit_softcapping", "final_logit_softcapping"),
)


class Family(NamedTuple):
    """One architecture of transformers.

    Attributes:
      architecture: the class that reads an exported folder.
      always: fields of TransformerConfig that are the same in all of its models.
      keys: of config.json, besides those that all families have.
      defaults: what config.json means where it lacks a key.
    """

    architecture: str
    always: dict[str, Any]
    keys: tuple[str, ...]
    defaults: dict[str, Any]


_PLAIN = {
    "norm_offset": 0.0,
    "post_norms": False,
    "scaled_embeddings": False,
    "qk_norm": False,
    "attention_bias": False,
    "attention_softcap": 0.0,
    "logit_softcap": 0.0,
    "attention_scale": 0.0,
    "rope_local_theta": 0.0,
}
_GEMMA = {
    "norm_offset": 1.0,
    "post_norms": True,
    "scaled_embeddings": True,
    "attention_bias": False,
}
_GEMMA_DEFAULTS = {
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "tie_word_embeddings": True,
}
_QWEN_DEFAULTS = {
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
    "rope_theta": 10_000.0,
}
FAMILIES = {
    "llama": Family(
        "LlamaForCausalLM",
        _PLAIN,
        ("hidden_act",),
        {"tie_word_embeddings": False, "rope_theta": 10_000.0},
    ),
    "qwen2": Family(
        "Qwen2ForCausalLM", {**_PLAIN, "attention_bias": True}, _QWEN_KEYS, _QWEN_DEFAULTS
    ),
    "qwen3": Family("Qwen3ForCausalLM", {**_PLAIN, "qk_norm": True}, _QWEN_KEYS, _QWEN_DEFAULTS),
    "gemma2": Family(
        "Gemma2ForCausalLM",
        {**_GEMMA, "qk_norm": False, "rope_local_theta": 0.0},
        # hidden_activation and sliding_window are those that count.
        (*_GEMMA_KEYS, "hidden_act", "sliding_window_size"),
        {
            **_GEMMA_DEFAULTS,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
            "rope_theta": 10_000.0,
        },
    ),
    "gemma3_text": Family(
        "Gemma3ForCausalLM",
        {**_GEMMA, "qk_norm": True, "attention_softcap": 0.0},
        (*_GEMMA_KEYS, "sliding_window_pattern", "rope_local_base_freq"),
        {  # the text_config of a model with pictures says only what differs from these
            **_GEMMA_DEFAULTS,
            "vocab_size": 262_208,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": 256,
            "max_position_embeddings": 131_072,
            "rms_norm_eps": 1e-6,
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
            "sliding_window_pattern": 6,
            "rope_theta": 1_000_000.0,
            "rope_local_base_freq": 10_000.0,
        },
    ),
}


def family_of(config: Config) -> str:
    """The model_type of transformers that computes what a configuration says.

    Raises:
      InputError: none does; naming the field that is in the way.
    """
    if config.has_encoder:
        return t5_config_file.family_of(config)
    if config.norm_offset == 1.0:
        name = "gemma3_text" if config.qk_norm else "gemma2"
    elif config.qk_norm:
        name = "qwen3"
    else:
        name = "qwen2" if config.attention_bias else "llama"
    family = FAMILIES[name]
    for field, value in family.always.items():
        if effective(field, config) != value:
            raise _not_exportable(field, config, f"{value!r} in every {name} model")
    if "layer_types" not in family.keys and any(config.attention_windows):
        raise _not_exportable("attention_windows", config, f"(0,) in every {name} model")
    if len({window for window in config.attention_windows if window}) > 1:
        raise _not_exportable("attention_windows", config, "of one size besides 0")
    if config.model_dim % config.num_heads:
        raise _not_exportable("model_dim", config, "a multiple of num_heads in transformers")
    if config.lora_rank:
        raise _not_exportable("lora_rank", config, "0: merge the adapters into the parameters")
    return name


def config_json(config: Config) -> dict[str, Any]:
    """The entries of the config.json that describes a network to transformers.

    Entries of rotary positions are written in the spelling of transformers 5 and in the one before.

    Raises:
      InputError: as `family_of`.
    """
    if config.has_encoder:
        return t5_config_file.config_json(config)
    name = family_of(config)
    entries = {
        "architectures": [FAMILIES[name].architecture],
        "model_type": name,
        "dtype": config.param_dtype,
        **{key: getattr(config, field) for field, key in KEYS.items()},
        "max_position_embeddings": config.max_length,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "use_cache": True,
        **rope_spellings.write(config, by_layer_type=name == "gemma3_text"),
    }
    activation = {ours: theirs for theirs, ours in ACTIVATIONS.items()}[config.activation]
    windows = layer_windows(config)
    if name != "qwen2":  # which has no such key
        entries["attention_bias"] = False
    if name == "llama":
        return {**entries, "mlp_bias": False, "hidden_act": activation}
    entries["layer_types"] = [SLIDING if window else FULL for window in windows]
    entries["sliding_window"] = max(windows) or None
    if name in ("qwen2", "qwen3"):
        first = next((i for i, window in enumerate(windows) if window), len(windows))
        entries |= {"use_sliding_window": any(windows), "max_window_layers": first}
        return {**entries, "hidden_act": activation}
    return {
        **entries,
        "hidden_activation": activation,
        "query_pre_attn_scalar": _attention_scalar(config),
        "attn_logit_softcapping": config.attention_softcap or None,
        "final_logit_softcapping": config.logit_softcap or None,
        "use_bidirectional_attention": False,
    }


def layer_windows(config: TransformerConfig) -> list[int]:
    """The attention window of every layer, 0 where it sees everything."""
    pattern = config.attention_windows
    return [pattern[layer % len(pattern)] for layer in range(config.num_layers)]


def effective(field: str, config: TransformerConfig) -> Any:
    """A field's value in the one form of those that mean the same."""
    if field == "attention_windows":
        return list(repeating(layer_windows(config)))
    if field == "rope_local_theta":
        same = config.rope_scaling == "none" and config.rope_local_theta == config.rope_theta
        return 0.0 if same or not any(config.attention_windows) else config.rope_local_theta
    if field == "attention_scale":
        usual = config.head_dim**-0.5
        scale = config.attention_scale or usual
        return 0.0 if math.isclose(scale, usual, rel_tol=1e-6) else scale
    return getattr(config, field)


def repeating(windows: list[int]) -> tuple[int, ...]:
    """The shortest pattern that gives these windows when it's repeated from the first layer on."""
    lengths = range(1, len(windows) + 1)
    fits = (n for n in lengths if all(w == windows[i % n] for i, w in enumerate(windows)))
    return tuple(windows[: next(fits)])


def _attention_scalar(config: TransformerConfig) -> int:
    """query_pre_attn_scalar: a whole number whose root divides the attention logits."""
    scalar = (config.attention_scale or config.head_dim**-0.5) ** -2
    if not math.isclose(scalar, round(scalar), rel_tol=1e-5):
        raise _not_exportable("attention_scale", config, "a whole number's power of -0.5")
    return round(scalar)


def _not_exportable(field: str, config: TransformerConfig, wanted: str) -> InputError:
    return InputError(
        f"transformer.TransformerConfig.{field} is {getattr(config, field)!r}, but it must be "
        f"{wanted}; transformers has no network that this one could be exported to."
    )

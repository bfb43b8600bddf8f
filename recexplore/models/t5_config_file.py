"""What the config.json of a T5, Flan-T5 or mT5 says, and what is written there.

Whether the output layer is the embedding table, after hidden states that are scaled, is said by

    t5 before transformers 5   "tie_word_embeddings"
    t5 since                   "scale_decoder_outputs"; the other is always true
    mt5                        nothing: every one has a table of its own
"""

from typing import TYPE_CHECKING, Any

from recexplore.errors import InputError
from recexplore.models.encoder_decoder import EncoderDecoderConfig

if TYPE_CHECKING:
    from recexplore.models.config_file import Said

SIZES = {  # field of EncoderDecoderConfig → key of config.json
    "vocab_size": "vocab_size",
    "num_encoder_layers": "num_layers",
    "num_decoder_layers": "num_decoder_layers",
    "model_dim": "d_model",
    "num_heads": "num_heads",
    "head_dim": "d_kv",
    "mlp_dim": "d_ff",
    "num_buckets": "relative_attention_num_buckets",
    "max_distance": "relative_attention_max_distance",
}
KEYS = {
    **SIZES,
    "start_id": "decoder_start_token_id",
    "end_id": "eos_token_id",
    "norm_epsilon": "layer_norm_epsilon",
    "activation": "feed_forward_proj",
    "tied_embeddings": "tie_word_embeddings",
}
_ACTIVATIONS = {"gated-gelu": "gelu", "gated-silu": "silu", "relu": "relu"}
_DEFAULTS = {
    "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128,
    "layer_norm_epsilon": 1e-6,
    "tie_word_embeddings": True,
    "eos_token_id": 1,
    "is_encoder_decoder": True,
}
FAMILIES = {  # model_type → what a config.json means where it lacks a key
    "t5": {**_DEFAULTS, "feed_forward_proj": "relu"},
    "mt5": {**_DEFAULTS, "feed_forward_proj": "gated-gelu"},
}
_SAYS_NOTHING = {  # of what the network computes; the middle line follows from feed_forward_proj
    *("dropout_rate", "classifier_dropout", "initializer_factor", "n_positions", "output_past"),
    *("dense_act_fn", "is_gated_act"),
    *("task_specific_params", "tokenizer_class", "gradient_checkpointing"),
}


def fill_in(entries: dict[str, Any]) -> dict[str, Any]:
    """The entries, and the family's defaults for those that they lack."""
    values = {**FAMILIES[entries["model_type"]], **entries}
    for key, other in (
        ("num_decoder_layers", "num_layers"),
        ("decoder_start_token_id", "pad_token_id"),
    ):
        if values.get(key) is None:
            values[key] = values.get(other)
    if values["decoder_start_token_id"] is None:
        values["decoder_start_token_id"] = 0
    return values


def fields(said: "Said", says_nothing: set[str]) -> dict[str, Any]:
    """The fields of EncoderDecoderConfig that a config.json decides, and nothing left unread.

    Args:
      said: of a family above.
      says_nothing: keys of any model that don't change what a network computes.

    Raises:
      InputError: a key that isn't known, or a value that isn't supported.
    """
    known = {*KEYS.values(), *_SAYS_NOTHING, *says_nothing}
    known |= {"scale_decoder_outputs", "is_encoder_decoder", "is_decoder"}
    for key, value in said.values.items():
        if key not in known and not key.startswith("_") and value is not None:
            raise said.unknown(key)
    if said.values.get("is_decoder") or not said.get("is_encoder_decoder", bool):
        raise InputError(
            f"{said.path} isn't that of an encoder and a decoder together, which is what "
            "recexplore reads of T5."
        )
    activation = said.values.get("feed_forward_proj")
    if activation not in _ACTIVATIONS:
        raise said.refuse("feed_forward_proj", f"supported are {', '.join(_ACTIVATIONS)}")
    return {
        **{field: said.get(key, int, 1) for field, key in SIZES.items()},
        "start_id": said.get("decoder_start_token_id", int),
        "end_id": -1 if said.values["eos_token_id"] is None else said.get("eos_token_id", int),
        "norm_epsilon": float(said.get("layer_norm_epsilon", (int, float))),
        "activation": _ACTIVATIONS[activation],
        "tied_embeddings": _tied(said),
        "bias_by_layer": False,
    }


def _tied(said: "Said") -> bool:
    tied = said.get("tie_word_embeddings", bool)
    if said.family == "mt5":
        return False
    return (
        tied
        if "scale_decoder_outputs" not in said.values
        else said.get("scale_decoder_outputs", bool)
    )


def family_of(config: EncoderDecoderConfig) -> str:
    """The model_type of transformers that computes what a configuration says.

    Raises:
      InputError: none does.
    """
    if config.bias_by_layer:
        raise InputError(
            "encoder_decoder.EncoderDecoderConfig.bias_by_layer is True, but it must be False; "
            "transformers has no network that this one could be exported to."
        )
    return "t5"


def config_json(config: EncoderDecoderConfig) -> dict[str, Any]:
    """The entries of the config.json that describes a network to transformers.

    Raises:
      InputError: as `family_of`.
    """
    activation = {ours: theirs for theirs, ours in _ACTIVATIONS.items()}[config.activation]
    return {
        "architectures": ["T5ForConditionalGeneration"],
        "model_type": family_of(config),
        "dtype": config.param_dtype,
        **{key: getattr(config, field) for field, key in SIZES.items()},
        "decoder_start_token_id": config.start_id,
        "eos_token_id": config.end_id if config.end_id >= 0 else None,
        "layer_norm_epsilon": config.norm_epsilon,
        "feed_forward_proj": activation,
        "tie_word_embeddings": config.tied_embeddings,
        "is_encoder_decoder": True,
        "dropout_rate": 0.0,
        "use_cache": True,
    }

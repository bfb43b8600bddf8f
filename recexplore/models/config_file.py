"""A network's configuration from the config.json of a Hugging Face folder.

Whatever the file says must be understood: a key that could change what the network computes and
isn't known here is an error, because a network that is almost the published one gives wrong answers
without a word.
"""

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from recexplore.errors import InputError, gin_name
from recexplore.models import rope_spellings, t5_config_file
from recexplore.models.encoder_decoder import EncoderDecoderConfig
from recexplore.models.families import (
    ACTIVATIONS,
    FAMILIES,
    FULL,
    KEYS,
    SIZES,
    SLIDING,
    effective,
    repeating,
)
from recexplore.models.networks import Config
from recexplore.models.rope_spellings import dictionary_at
from recexplore.models.transformer import TransformerConfig

CONFIG_FILE = "config.json"
_NO_END = (1 << 31) - 1  # relative positions reach any distance
_MUST_BE_OFF = (
    "attention_bias",  # would give the output projection a bias too
    "attention_dropout",
    "mlp_bias",
    "rope_interleaved",
    "use_bidirectional_attention",
    "use_mrope",
)
_SAYS_NOTHING = {  # of what the network computes
    *("architectures", "model_type", "transformers_version", "torch_dtype", "dtype", "use_cache"),
    *("initializer_range", "bos_token_id", "eos_token_id", "pad_token_id", "pretraining_tp"),
    *("cache_implementation", "is_llama_config", "transformers.js_config", "unsloth_version"),
    "unsloth_fixed",
}
_AROUND_TEXT = {  # in the config.json of Gemma 3 with pictures, of which only the text is read
    *("text_config", "vision_config", "mm_tokens_per_image", "tie_word_embeddings"),
    *("boi_token_index", "eoi_token_index", "image_token_index"),
    *("boi_token_id", "eoi_token_id", "image_token_id"),
}


class Said(NamedTuple):
    """What one config.json says of the language model in it.

    Attributes:
      path: the file.
      family: key of FAMILIES or of `t5_config_file.FAMILIES`.
      values: its entries, and the family's defaults for those that it lacks.
      pictures: the language model is a part of Gemma 3 with a vision tower, which isn't read.
    """

    path: Path
    family: str
    values: dict[str, Any]
    pictures: bool

    def get(self, key: str, kind: type | tuple[type, ...], least: int = 0) -> Any:
        """An entry of a certain type, a number no less than `least`.

        Raises:
          InputError: it's missing, or something else.
        """
        value = self.values.get(key)
        wrong = not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool)
        if wrong or (isinstance(value, int | float) and value < least):
            raise InputError(
                f"{self.path} has {key} {value!r}, which can't be. Download the model again."
            )
        return value

    @property
    def kind(self) -> type[Config]:
        """What describes such a network here."""
        return EncoderDecoderConfig if self.family in t5_config_file.FAMILIES else TransformerConfig

    def unknown(self, key: str) -> InputError:
        """The error that nobody knows what an entry means."""
        return self.refuse(
            key,
            f"recexplore doesn't know what that means for a {self.family} model. If it changes "
            "nothing in what the network computes, remove it from the file",
        )

    def refuse(self, key: str, why: str) -> InputError:
        """The error that an entry isn't supported."""
        return InputError(f"{self.path} has {key} {self.values.get(key)!r}; {why}.")


def read_config(folder: Path | str, max_length: int, **settings: Any) -> Config:
    """The configuration of the network in a Hugging Face folder.

    Args:
      folder: has config.json.
      max_length: longest sequence that it will be asked to read.
      **settings: fields of the configuration that the folder doesn't decide, such as dtype,
        param_dtype, remat, dropout_rate or lora_rank.

    Raises:
      InputError: an architecture or a feature that isn't supported, a field that the folder
        decides, a length above the model's own, or no readable config.json.
    """
    said = read_file(Path(folder))
    fields = _fields(said)
    known = {field.name for field in dataclasses.fields(said.kind)}
    for name in settings:
        if name not in known - {*fields, "max_length"}:
            raise InputError(
                f"config_file.read_config got {name}; settings are fields of {said.kind.__name__} "
                f"that {said.path} doesn't decide: "
                f"{', '.join(sorted(known - {*fields, 'max_length'}))}."
            )
    _check_length(said, max_length)
    return said.kind(**fields, max_length=max_length, **settings)


def check_config(folder: Path | str, config: Config) -> None:
    """Checks that a configuration is that of the network in a Hugging Face folder.

    Args:
      folder: has config.json.
      config: made by gin.

    Raises:
      InputError: naming every field that differs; or as `read_config`.
    """
    said = read_file(Path(folder))
    fields = _fields(said)
    _check_kind(said, gin_name(type(config)))
    wanted = said.kind(**fields, max_length=config.max_length)
    keys = t5_config_file.KEYS if wanted.has_encoder else KEYS
    different = []
    for name in fields:
        if not _same(name, config, wanted):
            key = f" ({keys[name]})" if name in keys else ""
            different.append(
                f"{gin_name(said.kind)}.{name} is {getattr(config, name)!r}, but "
                f"{said.path} has {getattr(wanted, name)!r}{key}"
            )
    if different:
        hint = ""
        if config.vocab_size != wanted.vocab_size:
            hint = (
                " vocab_size counts the rows of the embedding table, which may be more than the "
                "tokenizer's tokens."
            )
        raise InputError(f"{'; '.join(different)}. Bind what the file has.{hint}")
    _check_length(said, config.max_length)


def check_kind(folder: Path | str, name: str) -> None:
    """Checks that a configuration is of the kind that the network in a Hugging Face folder has.

    Args:
      folder: has config.json.
      name: of its class, as gin files call it.

    Raises:
      InputError: it isn't; or as `read_config`.
    """
    _check_kind(read_file(Path(folder)), name)


def embedding_rows(folder: Path | str) -> int:
    """Rows of the embedding table of the network in a Hugging Face folder.

    Raises:
      InputError: as `read_config`.
    """
    return read_file(Path(folder)).get(SIZES["vocab_size"], int, 1)


def longest_context(folder: Path | str) -> int:
    """Tokens that the network in a Hugging Face folder can read at most.

    Raises:
      InputError: as `read_config`.
    """
    return _longest(read_file(Path(folder)))


def read_file(folder: Path) -> Said:
    """Reads config.json and finds the family.

    Raises:
      InputError: the file is missing or damaged, or the architecture isn't supported.
    """
    path = folder / CONFIG_FILE
    try:
        entries = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise InputError(
            f"{path} is missing. {folder} must be a Hugging Face model folder on this computer: "
            "config.json, *.safetensors and the tokenizer's files."
        ) from error
    except (OSError, ValueError) as error:
        raise InputError(f"{path} can't be read as JSON ({error}). Download it again.") from error
    kind = entries.get("model_type") if isinstance(entries, dict) else None
    pictures = kind == "gemma3"
    if pictures:
        outer = entries
        for key, value in outer.items():
            if key not in _SAYS_NOTHING | _AROUND_TEXT and value is not None:
                raise InputError(f"{path} has {key} {value!r}, which isn't supported.")
        entries = dict(dictionary_at(path, "text_config", outer.get("text_config")))
        if "tie_word_embeddings" in outer:
            entries["tie_word_embeddings"] = outer["tie_word_embeddings"]
        kind = entries.setdefault("model_type", "gemma3_text")
    if kind in t5_config_file.FAMILIES:
        return Said(path, kind, t5_config_file.fill_in(entries), pictures)
    if kind not in FAMILIES:
        raise InputError(
            f"{path} has model_type {kind!r}, which isn't supported. Supported are: "
            f"{', '.join((*FAMILIES, 'gemma3', *t5_config_file.FAMILIES))}."
        )
    said = Said(path, kind, {**FAMILIES[kind].defaults, **entries}, pictures)
    heads = said.get("num_attention_heads", int, 1)
    if said.values.get("num_key_value_heads") is None:
        said.values["num_key_value_heads"] = heads
    if said.values.get("head_dim") is None:
        said.values["head_dim"] = said.get("hidden_size", int, 1) // heads
    return said


def _fields(said: Said) -> dict[str, Any]:
    """The fields of the configuration that a config.json decides, and nothing left unread."""
    if said.family in t5_config_file.FAMILIES:
        return t5_config_file.fields(said, _SAYS_NOTHING)
    _check_keys(said)
    values, family = said.values, FAMILIES[said.family]
    activation = "hidden_activation" if "hidden_activation" in family.keys else "hidden_act"
    if values.get(activation) not in ACTIVATIONS:
        raise said.refuse(activation, f"supported are {' and '.join(ACTIVATIONS)}")
    fields = {
        **{field: said.get(key, int, 1) for field, key in SIZES.items()},
        **family.always,
        "norm_epsilon": float(said.get("rms_norm_eps", (int, float))),
        "tied_embeddings": said.get("tie_word_embeddings", bool),
        "activation": ACTIVATIONS[values[activation]],
        "attention_windows": repeating(_windows(said)),
        **rope_spellings.read(said.path, values, by_layer_type=said.family == "gemma3_text"),
    }
    if "query_pre_attn_scalar" in family.keys:
        scalar = said.get("query_pre_attn_scalar", (int, float), 1)
        usual = scalar == fields["head_dim"]
        fields["attention_scale"] = 0.0 if usual else float(scalar) ** -0.5
        fields["logit_softcap"] = _softcap(said, "final_logit_softcapping")
        fields["attention_softcap"] = _softcap(said, "attn_logit_softcapping")
        if said.family == "gemma3_text" and fields["attention_softcap"]:
            raise said.refuse("attn_logit_softcapping", "Gemma 3 in transformers leaves it out")
    return fields


def _check_kind(said: Said, name: str) -> None:
    wanted = gin_name(said.kind)
    if name != wanted:
        network = wanted.removesuffix("Config")
        raise InputError(
            f"{said.path} is a {said.family} model's, whose configuration is {wanted}, not {name}. "
            f"Bind pipeline.train.make_config = @{wanted} and, for novelty models, "
            f"pipeline.train.make_network = @{network}."
        )


def _check_keys(said: Said) -> None:
    """Nothing in the file may be off the list, unless it's null."""
    known = {
        *(*KEYS.values(), *_MUST_BE_OFF, *_SAYS_NOTHING, *rope_spellings.KEYS),
        *("max_position_embeddings", *FAMILIES[said.family].keys),
    }
    for key, value in said.values.items():
        if key not in known and not key.startswith("_") and value is not None:
            raise said.unknown(key)
    for key in _MUST_BE_OFF:
        if said.values.get(key) and (key, said.family) != ("attention_bias", "qwen2"):
            raise said.refuse(key, "the network has nothing like it, so that must be off")


def _softcap(said: Said, key: str) -> float:
    return 0.0 if said.values.get(key) is None else float(said.get(key, (int, float)))


def _windows(said: Said) -> list[int]:
    """How far back each layer looks, 0 for everything."""
    count, kinds = said.get("num_hidden_layers", int, 1), said.values.get("layer_types")
    if "layer_types" not in FAMILIES[said.family].keys:
        return [0] * count
    if kinds is None:
        slides = _usual_sliding(said)
        kinds = [SLIDING if slides(layer) else FULL for layer in range(count)]
    if not isinstance(kinds, list) or len(kinds) != count or not {*kinds} <= {FULL, SLIDING}:
        raise said.refuse(
            "layer_types", f"supported is a list of {count} times {FULL} or {SLIDING}"
        )
    if SLIDING not in kinds:
        return [0] * count
    if not said.values.get("use_sliding_window", True):
        raise said.refuse("use_sliding_window", f"but layer_types has {SLIDING}")
    window = said.get("sliding_window", int, 1)
    return [window if kind == SLIDING else 0 for kind in kinds]


def _usual_sliding(said: Said) -> Callable[[int], bool]:
    """Which layers of a family have a window where layer_types doesn't say."""
    if said.family == "gemma2":
        return lambda layer: layer % 2 == 0
    if said.family == "gemma3_text":
        pattern = said.get("sliding_window_pattern", int, 1)
        return lambda layer: (layer + 1) % pattern != 0
    slides, first = said.values["use_sliding_window"], said.get("max_window_layers", int)
    return lambda layer: slides and layer >= first


def _check_length(said: Said, max_length: int) -> None:
    longest = _longest(said)
    if max_length > longest:
        raise InputError(
            f"transformer.TransformerConfig.max_length is {max_length}, but {said.path} has "
            f"max_position_embeddings {longest}. Choose a shorter max_length."
        )


def _longest(said: Said) -> int:
    if said.family in t5_config_file.FAMILIES:
        return _NO_END
    return said.get("max_position_embeddings", int, 1)


def _same(field: str, config: Config, wanted: Config) -> bool:
    if wanted.has_encoder:
        ours, theirs = getattr(config, field), getattr(wanted, field)
    else:
        ours, theirs = effective(field, config), effective(field, wanted)
    if isinstance(theirs, float):
        return math.isclose(ours, theirs, rel_tol=1e-6)
    return ours == theirs

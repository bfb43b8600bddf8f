"""Rotary positions in config.json: as transformers 5 spells them, and as versions before did.

    before      "rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", "factor": 8, …}
    since       "rope_parameters": {"rope_theta": 5e5, "rope_type": "llama3", "factor": 8, …}

Gemma 3 has two rotations, one for layers with an attention window:

    before      "rope_theta": 1e6, "rope_local_base_freq": 1e4, "rope_scaling": {…}
    since       "rope_parameters": {"full_attention": {…}, "sliding_attention": {…}}
"""

from pathlib import Path
from typing import Any

from recexplore.errors import InputError
from recexplore.models.transformer import TransformerConfig

KEYS = ("rope_parameters", "rope_scaling", "rope_theta")
_GLOBAL, _LOCAL = "full_attention", "sliding_attention"
_TYPES = ("default", "linear", "llama3")
_NUMBERS = {  # field of TransformerConfig → key of the dictionary
    "rope_theta": "rope_theta",
    "rope_factor": "factor",
    "rope_low_frequency_factor": "low_freq_factor",
    "rope_high_frequency_factor": "high_freq_factor",
    "rope_original_length": "original_max_position_embeddings",
}
_OF_TYPE = {  # which numbers count, besides the base
    "default": (),
    "linear": ("rope_factor",),
    "llama3": tuple(field for field in _NUMBERS if field != "rope_theta"),
}


def read(path: Path, values: dict[str, Any], by_layer_type: bool) -> dict[str, Any]:
    """The rotary fields of TransformerConfig.

    Args:
      path: of config.json, for messages.
      values: its entries; `rope_theta` (and `rope_local_base_freq`) have their defaults.
      by_layer_type: layers with a window have a rotation of their own (Gemma 3).

    Raises:
      InputError: a kind of scaling that isn't supported, something missing or unknown, or two
        spellings that differ.
    """
    found = []
    new, old = values.get("rope_parameters"), values.get("rope_scaling")
    if new is not None:
        found.append(
            _read_new(path, values, dictionary_at(path, "rope_parameters", new), by_layer_type)
        )
    if old is not None or not found:
        scaling = {} if old is None else dictionary_at(path, "rope_scaling", old)
        found.append(_one(path, values, "rope_scaling", scaling))
        if by_layer_type:
            found[-1]["rope_local_theta"] = _number(path, values, "rope_local_base_freq")
    if found[0] != found[-1]:
        raise InputError(
            f"{path} has rope_scaling {old!r} and rope_parameters {new!r}, which say different "
            "things. Keep the right one."
        )
    return found[0]


def write(config: TransformerConfig, by_layer_type: bool) -> dict[str, Any]:
    """Rotary positions in both spellings.

    Args:
      config: of the network.
      by_layer_type: layers with a window have a rotation of their own (Gemma 3).
    """
    kind = "default" if config.rope_scaling == "none" else config.rope_scaling
    numbers = {_NUMBERS[field]: getattr(config, field) for field in _OF_TYPE[kind]}
    scaling = {"rope_type": kind, **numbers}
    entries = {
        "rope_theta": config.rope_theta,
        "rope_scaling": None if kind == "default" else scaling,
        "rope_parameters": {**scaling, "rope_theta": config.rope_theta},
    }
    if not by_layer_type:
        return entries
    rotation = entries["rope_parameters"]
    local = {"rope_type": "default", "rope_theta": config.rope_local_theta}
    parameters = {_GLOBAL: rotation, _LOCAL: local if config.rope_local_theta else rotation}
    if not config.rope_local_theta:  # the older spelling can't scale those layers
        return {"rope_parameters": parameters}
    return {
        **entries,
        "rope_parameters": parameters,
        "rope_local_base_freq": config.rope_local_theta,
    }


def dictionary_at(path: Path, key: str, value: Any) -> dict[str, Any]:
    """An entry of config.json that must be a dictionary.

    Raises:
      InputError: it isn't.
    """
    if not isinstance(value, dict):
        raise InputError(f"{path} has {key} {value!r}, which can't be. Download the model again.")
    return value


def _read_new(path, values, new, by_layer_type) -> dict[str, Any]:
    if not by_layer_type:
        return _one(path, values, "rope_parameters", new)
    if not {*new} <= {_GLOBAL, _LOCAL}:
        raise InputError(
            f"{path} has rope_parameters {new!r}; expected are the entries {_GLOBAL} and {_LOCAL}."
        )
    parts = {kind: dictionary_at(path, kind, new.get(kind) or {}) for kind in (_GLOBAL, _LOCAL)}
    outside = {"rope_theta": values["rope_theta"]}
    inside = {"rope_theta": values["rope_local_base_freq"]}
    rotation = _one(path, {**values, **outside}, _GLOBAL, parts[_GLOBAL])
    local = _one(path, {**values, **inside}, _LOCAL, parts[_LOCAL])
    if local["rope_scaling"] == "none":
        return {**rotation, "rope_local_theta": local["rope_theta"]}
    if local == rotation:
        return {**rotation, "rope_local_theta": 0.0}
    raise InputError(
        f"{path} has rope_parameters {new!r}; layers with a window must have rope_type default, or "
        "the same as the others."
    )


def _one(path: Path, values: dict[str, Any], name: str, said: dict[str, Any]) -> dict[str, Any]:
    """One rotation's fields; its base may stand beside it instead of in it."""
    kind = said.get("rope_type", said.get("type", "default"))
    if kind not in _TYPES:
        raise InputError(
            f"{path} has {name} of rope_type {kind!r}, which isn't supported. Supported are: "
            f"{', '.join(_TYPES)}."
        )
    unknown = {*said} - {"rope_type", "type", "partial_rotary_factor", *_NUMBERS.values()}
    if unknown or said.get("partial_rotary_factor") not in (None, 1, 1.0):
        raise InputError(f"{path} has {name} {said!r}, of which not everything is supported.")
    numbers = {"rope_theta": values["rope_theta"], **said}
    if kind == "llama3" and "original_max_position_embeddings" not in said:
        numbers["original_max_position_embeddings"] = values.get("max_position_embeddings")
    fields = {"rope_scaling": "none" if kind == "default" else kind}
    for field in ("rope_theta", *_OF_TYPE[kind]):
        fields[field] = _number(path, numbers, _NUMBERS[field])
    if kind == "llama3":
        fields["rope_original_length"] = int(fields["rope_original_length"])
    return fields


def _number(path: Path, values: dict[str, Any], key: str) -> float:
    value = values.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
        raise InputError(
            f"{path} has {key} {value!r} for its rotary positions, which can't be. Download the "
            "model again."
        )
    return float(value)

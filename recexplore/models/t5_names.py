"""Where checkpoints of the T5 family keep each of the network's parameters: Hugging Face's, T5X's.

Layouts are written as in tensor_names.py; besides, E are the encoder's layers, L the decoder's, and
N buckets of relative positions.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from recexplore.errors import InputError
from recexplore.models.encoder_decoder import EncoderDecoderConfig
from recexplore.models.tensor_names import OUTPUT_TABLE, Tensor

EMBEDDING_TABLE = "shared.weight"
_LAYERS = {"encoder": "E", "decoder": "L"}  # the letter of each stack's layers
_ATTENTION = {  # parameter → Hugging Face's name, its layout there, T5X's, ours
    "query": ("q", "Hh D", "D Hh", "DHh"),
    "key": ("k", "Hh D", "D Hh", "DHh"),
    "value": ("v", "Hh D", "D Hh", "DHh"),
    "out": ("o", "D Hh", "Hh D", "HhD"),
}
_HIDDEN = ("F D", "D F", "DF")
_PARTS = {  # stack → its attentions and norms, in Hugging Face's order of sublayers
    "encoder": (("pre_attention_layer_norm", "attention", "SelfAttention"),),
    "decoder": (
        ("pre_self_attention_layer_norm", "self_attention", "SelfAttention"),
        ("pre_cross_attention_layer_norm", "encoder_decoder_attention", "EncDecAttention"),
    ),
}


def axis_sizes(config: EncoderDecoderConfig) -> dict[str, int]:
    """The size of each letter's axis."""
    return {
        "V": config.vocab_size,
        "D": config.model_dim,
        "H": config.num_heads,
        "h": config.head_dim,
        "F": config.mlp_dim,
        "N": config.num_buckets,
        "E": config.num_encoder_layers,
        "L": config.num_decoder_layers,
    }


def tensor_names(config: EncoderDecoderConfig) -> dict[str, Tensor]:
    """Every parameter's tensor in a Hugging Face folder.

    Args:
      config: of the network; without `bias_by_layer`, which no such folder has.

    Returns:
      The parameter's path in the network, joined by "/" → its tensor.
    """
    table = {"token_embedder": Tensor(EMBEDDING_TABLE, ("V", "D"), "VD")}
    if not config.tied_embeddings:
        table["logits_dense"] = Tensor(OUTPUT_TABLE, ("V", "D"), "VD")
    for stack, parts in _PARTS.items():
        layers, found = f"{stack}.block.{{}}.layer", {}
        for place, (norm, attention, theirs) in enumerate(parts):
            found[f"{norm}/scale"] = (f"{place}.layer_norm", "D", "D")
            for name, (letter, stored, _, kept) in _ATTENTION.items():
                found[f"{attention}/{name}"] = (f"{place}.{theirs}.{letter}", stored, kept)
        last = len(parts)
        found["pre_mlp_layer_norm/scale"] = (f"{last}.layer_norm", "D", "D")
        for name, (stored, _, kept) in _mlp(config).items():
            found[f"mlp/{name}"] = (f"{last}.DenseReluDense.{name}", stored, kept)
        for path, (name, stored, kept) in found.items():
            table[f"{stack}/layers/{path}"] = Tensor(
                f"{layers}.{name}.weight", tuple(stored.split()), kept, _LAYERS[stack]
            )
        bias = f"{layers.format(0)}.0.SelfAttention.relative_attention_bias.weight"
        table[f"{stack}/relpos_bias/rel_embedding"] = Tensor(bias, ("N", "H"), "HN")
        norm = f"{stack}.final_layer_norm.weight"
        table[f"{stack}/{stack}_norm/scale"] = Tensor(norm, ("D",), "D")
    return table


def t5x_names(config: EncoderDecoderConfig) -> dict[str, Tensor]:
    """Every parameter's array in a tree of T5X, by the same paths.

    Names are those of t5x/examples/t5, a layer an entry; with `bias_by_layer` those of
    t5x/examples/scalable_t5, where layers are stacked along one axis of each array: names then have
    no number.
    """
    table = {"token_embedder": Tensor("token_embedder/embedding", ("V", "D"), "VD")}
    if not config.tied_embeddings:
        table["logits_dense"] = Tensor("decoder/logits_dense/kernel", ("D", "V"), "VD")
    for stack, parts in _PARTS.items():
        layers = f"{stack}/{stack}" if config.bias_by_layer else f"{stack}/layers_{{}}"
        found = {}
        for norm, attention, _ in parts:
            found[f"{norm}/scale"] = ("", "D", "D")
            for name, (_, _, stored, kept) in _ATTENTION.items():
                found[f"{attention}/{name}"] = ("/kernel", stored, kept)
        found["pre_mlp_layer_norm/scale"] = ("", "D", "D")
        for name, (_, stored, kept) in _mlp(config).items():
            found[f"mlp/{name}"] = ("/kernel", stored, kept)
        bias = "relpos_bias/rel_embedding"
        if config.bias_by_layer:
            found[bias] = ("", "H N", "HN")
        else:
            table[f"{stack}/{bias}"] = Tensor(f"{stack}/{bias}", ("H", "N"), "HN")
        for path, (end, stored, kept) in found.items():
            # Scanned kernels keep heads and their width apart.
            axes = tuple(stored.replace(" ", "") if config.bias_by_layer else stored.split())
            table[f"{stack}/layers/{path}"] = Tensor(
                f"{layers}/{path}{end}", axes, kept, _LAYERS[stack]
            )
        table[f"{stack}/{stack}_norm/scale"] = Tensor(f"{stack}/{stack}_norm/scale", ("D",), "D")
    return table


def from_t5x(
    tree: Mapping[str, Any], config: EncoderDecoderConfig, scan_axis: int = 1
) -> dict[str, Any]:
    """Parameters from a tree of T5X: the target of a checkpoint, or of a train state.

    Args:
      tree: nested dictionaries of arrays, named as t5x/examples/t5 or t5x/examples/scalable_t5 do.
      config: of the network; `bias_by_layer` for the second, whose layers are scanned.
      scan_axis: of scanned arrays, along which the layers lie (T5X's `param_scan_axis`).

    Returns:
      {"params": …} in numpy and config.param_dtype, as `EncoderDecoder` takes them.

    Raises:
      InputError: an array is missing, isn't expected or has another shape.
    """
    flat = flatten_dict(dict(tree), sep="/")
    table, sizes = t5x_names(config), axis_sizes(config)
    expected = {name for tensor in table.values() for name in tensor.names(sizes)}
    if {*flat} != expected:
        raise InputError(_difference(expected, {*flat}, config))
    params = {}
    for path, tensor in table.items():
        shape = tensor.stored_shape(sizes)
        count = sizes[tensor.layers]
        scanned = config.bias_by_layer and "/layers/" in path
        if scanned:
            shape = (*shape[:scan_axis], count, *shape[scan_axis:])
        arrays = [np.asarray(flat[name]) for name in tensor.names(sizes)]
        for name, array in zip(tensor.names(sizes), arrays, strict=True):
            if array.shape != shape:
                raise InputError(
                    f"T5X's {name} has shape {array.shape}, but "
                    f"encoder_decoder.EncoderDecoderConfig makes it {shape}. Bind the sizes of the "
                    "model that the checkpoint is from."
                )
        if scanned:
            arrays = np.moveaxis(arrays[0], scan_axis, 0)
        kept = [tensor.to_kept(array, sizes).astype(config.param_dtype) for array in arrays]
        params[path] = np.stack(kept) if scanned or tensor.in_layers else kept[0]
    return {"params": unflatten_dict(params, sep="/")}


def to_t5x(
    params: Mapping[str, Any], config: EncoderDecoderConfig, scan_axis: int = 1
) -> dict[str, Any]:
    """The inverse of `from_t5x`.

    Args:
      params: {"params": …} of an `EncoderDecoder`.
      config: of the network.
      scan_axis: of scanned arrays, along which the layers will lie.

    Returns:
      Nested dictionaries of numpy arrays.
    """
    flat = flatten_dict(dict(params["params"]), sep="/")
    tree, sizes = {}, axis_sizes(config)
    for path, tensor in t5x_names(config).items():
        array = np.asarray(flat[path])
        if "/layers/" not in path:
            tree[tensor.name] = tensor.to_stored(array)
            continue
        layers = [tensor.to_stored(layer) for layer in array]
        if config.bias_by_layer:
            tree[tensor.name] = np.stack(layers, axis=scan_axis)
        else:
            tree |= dict(zip(tensor.names(sizes), layers, strict=True))
    return unflatten_dict(tree, sep="/")


def _mlp(config: EncoderDecoderConfig) -> dict[str, tuple[str, str, str]]:
    """The MLP's kernels: Hugging Face's layout, T5X's, ours."""
    first = ("wi",) if config.activation == "relu" else ("wi_0", "wi_1")
    return {**dict.fromkeys(first, _HIDDEN), "wo": ("D F", "F D", "FD")}


def _difference(expected: set[str], found: set[str], config: EncoderDecoderConfig) -> str:
    missing, extra = sorted(expected - found), sorted(found - expected)
    parts = [
        f"{what} {', '.join(names[:3])}{' …' if len(names) > 3 else ''}"
        for what, names in (("lacks", missing), ("has besides", extra))
        if names
    ]
    scanned = any(name.startswith(("encoder/encoder/", "decoder/decoder/")) for name in found)
    remedy = "Bind the sizes of the model that the checkpoint is from"
    if scanned != config.bias_by_layer:
        remedy = f"Bind encoder_decoder.EncoderDecoderConfig.bias_by_layer = {scanned}"
    return f"The tree of T5X {'; it '.join(parts)}. {remedy}."

"""Where a Hugging Face checkpoint keeps each of the network's parameters, and in which layout.

A layout is written as axes: "Hh D" is a table whose rows are H heads of width h and whose columns
are D wide; "DHh" is the same as the network keeps it, one letter an axis. V vocabulary, D model,
H query heads, G key/value heads, h width of a head, F MLP, L layers. T5's are in t5_names.py.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from recexplore.models.families import FAMILIES
from recexplore.models.transformer import TransformerConfig

OUTPUT_TABLE, EMBEDDING_TABLE = "lm_head.weight", "embed_tokens.weight"
MODEL = "model."  # what other names than the output table's begin with


class Tensor(NamedTuple):
    """One tensor of a checkpoint, or one in each layer.

    Attributes:
      name: in the file; `{}` is the layer's number.
      stored: its axes in the file.
      kept: its axes in the network, but for that of layers.
      layers: the letter of that one, where it has it.
    """

    name: str
    stored: tuple[str, ...]
    kept: str
    layers: str = "L"

    def names(self, sizes: Mapping[str, int]) -> list[str]:
        """One name a layer, or the only one.

        Args:
          sizes: of `axis_sizes`.
        """
        count = sizes[self.layers] if self.in_layers else 1
        return [self.name.format(layer) for layer in range(count)]

    def kept_shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """Its shape in the network, the axis of layers included.

        Args:
          sizes: of `axis_sizes`.
        """
        axes = self.layers + self.kept if self.in_layers else self.kept
        return tuple(sizes[axis] for axis in axes)

    @property
    def in_layers(self) -> bool:
        """Whether each layer has one."""
        return "{}" in self.name

    def stored_shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """Its shape in the file.

        Args:
          sizes: of `axis_sizes`.
        """
        return tuple(math.prod(sizes[axis] for axis in joined) for joined in self.stored)

    def to_kept(self, rows: np.ndarray, sizes: Mapping[str, int]) -> np.ndarray:
        """A view of what stands in the file, laid out as in the network.

        Args:
          rows: the tensor or a part of it; its first axis is cut between whole values of the first
            letter.
          sizes: of `axis_sizes`; of the part, where it is one.
        """
        letters = "".join(self.stored)
        split = rows.reshape([sizes[axis] for axis in letters])
        return split.transpose([letters.index(axis) for axis in self.kept])

    def to_stored(self, kept: np.ndarray) -> np.ndarray:
        """The inverse of `to_kept`: how the whole tensor stands in the file, in one piece."""
        letters = "".join(self.stored)
        sizes = dict(zip(self.kept, kept.shape, strict=True))
        words = kept.view(f"u{kept.itemsize}")  # numpy moves bfloat16 one by one, words at once
        split = words.transpose([self.kept.index(axis) for axis in letters])
        return np.ascontiguousarray(split).reshape(self.stored_shape(sizes)).view(kept.dtype)


def _in_layers(tensors: dict[str, tuple[str, str, str]]) -> dict[str, Tensor]:
    """Tensors of every layer: parameter → name in the file, layout there, layout here."""
    return {
        f"layers/{path}": Tensor(f"{MODEL}layers.{{}}.{name}", tuple(stored.split()), kept)
        for path, (name, stored, kept) in tensors.items()
    }


_EVERYWHERE = {
    "token_embedder": Tensor(f"{MODEL}{EMBEDDING_TABLE}", ("V", "D"), "VD"),
    "decoder_norm/scale": Tensor(f"{MODEL}norm.weight", ("D",), "D"),
    **_in_layers(
        {
            "pre_attention_layer_norm/scale": ("input_layernorm.weight", "D", "D"),
            "self_attention/query": ("self_attn.q_proj.weight", "Hh D", "DHh"),
            "self_attention/key": ("self_attn.k_proj.weight", "Gh D", "DGh"),
            "self_attention/value": ("self_attn.v_proj.weight", "Gh D", "DGh"),
            "self_attention/out": ("self_attn.o_proj.weight", "D Hh", "HhD"),
            "mlp/wi_0": ("mlp.gate_proj.weight", "F D", "DF"),
            "mlp/wi_1": ("mlp.up_proj.weight", "F D", "DF"),
            "mlp/wo": ("mlp.down_proj.weight", "D F", "FD"),
        }
    ),
}
_BEFORE_MLP = _in_layers(
    {"pre_mlp_layer_norm/scale": ("post_attention_layernorm.weight", "D", "D")}
)
_AROUND_BOTH = _in_layers(  # Gemma, which gives the name above to another norm
    {
        "post_attention_layer_norm/scale": ("post_attention_layernorm.weight", "D", "D"),
        "pre_mlp_layer_norm/scale": ("pre_feedforward_layernorm.weight", "D", "D"),
        "post_mlp_layer_norm/scale": ("post_feedforward_layernorm.weight", "D", "D"),
    }
)
_BIASES = _in_layers(
    {
        "self_attention/query_bias": ("self_attn.q_proj.bias", "Hh", "Hh"),
        "self_attention/key_bias": ("self_attn.k_proj.bias", "Gh", "Gh"),
        "self_attention/value_bias": ("self_attn.v_proj.bias", "Gh", "Gh"),
    }
)
_QK_NORMS = _in_layers(
    {
        "self_attention/query_norm/scale": ("self_attn.q_norm.weight", "h", "h"),
        "self_attention/key_norm/scale": ("self_attn.k_norm.weight", "h", "h"),
    }
)


def axis_sizes(config: TransformerConfig) -> dict[str, int]:
    """The size of each letter's axis."""
    return {
        "V": config.vocab_size,
        "D": config.model_dim,
        "H": config.num_heads,
        "G": config.num_kv_heads,
        "h": config.head_dim,
        "F": config.mlp_dim,
        "L": config.num_layers,
    }


def tensor_names(family: str, tied_embeddings: bool) -> dict[str, Tensor]:
    """Every parameter's tensor.

    Args:
      family: key of `families.FAMILIES`.
      tied_embeddings: there is no output table.

    Returns:
      The parameter's path in the network, joined by "/" → its tensor.
    """
    table = dict(_EVERYWHERE)
    if not tied_embeddings:
        table["logits_dense"] = Tensor(OUTPUT_TABLE, ("V", "D"), "VD")
    always = FAMILIES[family].always
    table |= _AROUND_BOTH if always["post_norms"] else _BEFORE_MLP
    table |= _BIASES if always["attention_bias"] else {}
    table |= _QK_NORMS if always["qk_norm"] else {}
    return table

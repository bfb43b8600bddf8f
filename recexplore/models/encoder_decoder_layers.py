"""What an encoder–decoder's two stacks are made of: attention with biases, blocks of it, layers.

`config` is a recexplore.models.encoder_decoder.EncoderDecoderConfig; that file imports this one.
"""

import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
from jaxtyping import Array, Bool, Float, Int

from recexplore.models.attention import KeyValues, Segment, attend, beside
from recexplore.models.layers import (
    GatedMLP,
    RMSNorm,
    constrain,
    parameter,
    product,
    project,
    read_last_layer_at,
    take_tokens,
)
from recexplore.models.relative_positions import RelativeBias, buckets_of
from recexplore.models.transformer import REMAT

PLAIN = "relu"  # the activation of an MLP without a gate
_HEADS = ("activation_batch", None, "activation_heads", None)


class Encoder(nn.Module):
    """Layers that look both ways."""

    config: Any

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "*batch S D"],
        positions: Int[Array, "..."],
        real: Bool[Array, "*batch S"],
        deterministic: bool,
    ) -> Float[Array, "*batch S D"]:
        """Normalised hidden states; see `EncoderDecoder.encode`."""
        c = self.config
        distances = positions[..., None, :] - positions[..., :, None]
        buckets = buckets_of(distances, c.num_buckets, c.max_distance, both_ways=True)
        sight = _Sight((real[..., None, :],), (buckets,), ())
        if not c.bias_by_layer:
            sight = sight.biased_by(RelativeBias(c, name="relpos_bias"))
        how = _scan(c, c.num_encoder_layers, in_axes=(nn.broadcast, nn.broadcast))
        layers = nn.scan(_rematerialised(EncoderBlock, c, c.num_encoder_layers, 3), **how)
        x, _ = layers(c, name="layers")(x, sight, deterministic)
        return RMSNorm(c, name="encoder_norm")(x)


class Decoder(nn.Module):
    """Layers that look back, and at what the encoder has made of a prompt."""

    config: Any

    def setup(self):
        c = self.config
        forward = (0, 0, nn.broadcast, nn.broadcast)
        methods = {
            "__call__": _scan(c, c.num_decoder_layers, in_axes=forward),
            "read": _scan(c, c.num_decoder_layers, in_axes=()),
        }
        block = _rematerialised(DecoderBlock, c, c.num_decoder_layers, 5)
        self.layers = nn.scan(block, methods=methods)(c)
        if not c.bias_by_layer:
            self.relpos_bias = RelativeBias(c)
        self.decoder_norm = RMSNorm(c)

    def read(self, encoded: Float[Array, "*batch S D"]) -> KeyValues:
        """Keys and values of every layer's attention to the encoder's hidden states."""
        return self.layers.read(encoded)[1]

    def __call__(
        self,
        x: Float[Array, "*batch T D"],
        positions: Int[Array, "*batch T"],
        own_mask: Bool[Array, "..."],
        context: tuple[Segment, ...],
        context_masks: tuple[Bool[Array, "..."], ...],
        deterministic: bool,
        read_at: Int[Array, "*batch R"] | None,
    ) -> tuple[Float[Array, "*batch R D"], KeyValues]:
        """Normalised hidden states, and the tokens' own keys and values; see
        `EncoderDecoder.extend`."""
        c = self.config
        encoded, *before = (KeyValues(segment.keys, segment.values) for segment in context)
        encoded_mask, *masks = (*context_masks, own_mask)
        kept = (beside(segment.positions, positions.ndim) for segment in context[1:])
        distances = (keys - positions[..., :, None] for keys in (*kept, positions[..., None, :]))
        buckets = (
            buckets_of(some, c.num_buckets, c.max_distance, both_ways=False) for some in distances
        )
        sight = _Sight(tuple(masks), tuple(buckets), (encoded_mask,))
        if not c.bias_by_layer:
            sight = sight.biased_by(self.relpos_bias)
        if read_at is None:
            x, own = self.layers(x, tuple(before), encoded, sight, deterministic)
        else:
            x, own = self._layers_read_at(x, tuple(before), encoded, sight, read_at)
        return self.decoder_norm(x), own

    def _layers_read_at(self, x, context, encoded, sight, read_at) -> tuple[Array, KeyValues]:
        """`self.layers`, the last of which comes after the others; without dropout."""
        block, count = DecoderBlock(self.config, parent=None), self.config.num_decoder_layers
        variables = {name: tree["layers"] for name, tree in self.variables.items()}
        stacked = nn.unbox(variables), context, encoded

        def run(x, layer, read_at=None):
            variables, kept, memory = jax.tree.map(lambda a: a[layer], stacked)
            return block.apply(variables, x, kept, memory, sight, True, read_at)

        return read_last_layer_at(read_at, run, x, count, self.config.scan_unroll)


class _Sight(NamedTuple):
    """What tokens may look at, in every layer.

    Attributes:
      masks: for every segment, and at last for the tokens themselves, where they may look.
      biases: for each what is added to the attention logits of every head; or the buckets, until a
        layer that has biases of its own has looked them up.
      encoded: one mask for the encoded prompt; in the encoder none.
    """

    masks: tuple[Bool[Array, "..."], ...]
    biases: tuple[Array, ...]
    encoded: tuple[Bool[Array, "..."], ...]

    def at(self, places: Int[Array, "*batch R"]) -> "_Sight":
        """What those of the tokens may look at."""
        ndim = places.ndim + 1

        def pick(x):  # [*batch, T, S], with size-1 axes
            x = x.reshape((1,) * (ndim - x.ndim) + x.shape)
            return x if x.shape[-2] == 1 else take_tokens(x, places)

        masks, encoded = tuple(map(pick, self.masks)), tuple(map(pick, self.encoded))
        return _Sight(masks, tuple(map(jax.vmap(pick), self.biases)), encoded)

    def biased_by(self, bias: RelativeBias) -> "_Sight":
        """With biases in the place of buckets."""
        return self._replace(biases=tuple(map(bias, self.biases)))


class Attention(nn.Module):
    """Attention to context segments and to the tokens themselves; its logits aren't scaled.

    With `read_at`, only those of the tokens look; all of them can be looked at.
    """

    config: Any

    @nn.compact
    def __call__(self, x, context, sight, read_at=None):
        c = self.config
        embed, heads = {"embed": c.model_dim}, {"heads": c.num_heads, "kv": c.head_dim}
        reader, at = x, sight
        if read_at is not None:
            reader, at = take_tokens(x, read_at), sight.at(read_at)
        queries = project(self, reader, "query", embed, heads, spread=c.head_dim**-0.5)
        keys = project(self, x, "key", embed, heads)
        values = project(self, x, "value", embed, heads)
        queries, keys, values = (constrain(some, *_HEADS) for some in (queries, keys, values))
        own = KeyValues(keys, values)
        mixed = attend(queries, (*context, own), at.masks, scale=1.0, biases=at.biases)
        return project(self, constrain(mixed, *_HEADS), "out", heads, embed), own


class EncodedAttention(nn.Module):
    """Attention to an encoded prompt, whose keys and values are computed once."""

    config: Any

    def setup(self):
        c = self.config
        embed, heads = {"embed": c.model_dim}, {"heads": c.num_heads, "kv": c.head_dim}
        spread = c.model_dim**-0.5
        narrow = nn.initializers.normal(stddev=spread * c.head_dim**-0.5)
        wide = nn.initializers.normal(stddev=spread)
        joined = nn.initializers.normal(stddev=(c.num_heads * c.head_dim) ** -0.5)
        self.query = parameter(self, "query", embed | heads, narrow)
        self.key = parameter(self, "key", embed | heads, wide)
        self.value = parameter(self, "value", embed | heads, wide)
        self.out = parameter(self, "out", heads | embed, joined)

    def read(self, encoded: Float[Array, "*batch S D"]) -> KeyValues:
        """Keys and values of the encoder's hidden states."""
        keys, values = (product(encoded, kernel, 1) for kernel in (self.key, self.value))
        return KeyValues(constrain(keys, *_HEADS), constrain(values, *_HEADS))

    def __call__(self, x, encoded, mask):
        queries = constrain(product(x, self.query, 1), *_HEADS)
        mixed = attend(queries, (encoded,), (mask,), scale=1.0)
        return product(constrain(mixed, *_HEADS), self.out, 2)


class MLP(nn.Module):
    """Two products with a rectifier between them, as the original T5 has it."""

    config: Any

    @nn.compact
    def __call__(self, x):
        c = self.config
        embed, hidden = {"embed": c.model_dim}, {"mlp": c.mlp_dim}
        x = nn.relu(project(self, x, "wi", embed, hidden))
        x = constrain(x, "activation_batch", None, "activation_mlp")
        return project(self, x, "wo", hidden, embed)


class EncoderBlock(nn.Module):
    """One layer: attention and MLP, each normalised before and added to the residual stream."""

    config: Any

    @nn.compact
    def __call__(self, x, sight, deterministic):
        c = self.config
        drop = nn.Dropout(c.dropout_rate, deterministic=deterministic)
        if c.bias_by_layer:
            sight = sight.biased_by(RelativeBias(c, name="relpos_bias"))
        with jax.named_scope("attention"):
            normal = RMSNorm(c, name="pre_attention_layer_norm")(x)
            x = x + drop(Attention(c, name="attention")(normal, (), sight)[0])
        with jax.named_scope("mlp"):
            normal = RMSNorm(c, name="pre_mlp_layer_norm")(x)
            x = x + drop(_mlp(c, name="mlp")(normal))
        return constrain(x, "activation_batch", None, "activation_embed"), None


class DecoderBlock(nn.Module):
    """One layer: attention to what was read before, attention to the encoded prompt, and MLP.

    With `read_at`, what comes out are those of the tokens.
    """

    config: Any

    def setup(self):
        c = self.config
        self.pre_self_attention_layer_norm = RMSNorm(c)
        self.self_attention = Attention(c)
        self.pre_cross_attention_layer_norm = RMSNorm(c)
        self.encoder_decoder_attention = EncodedAttention(c)
        self.pre_mlp_layer_norm = RMSNorm(c)
        self.mlp = _mlp(c)
        self.dropout = nn.Dropout(c.dropout_rate)
        if c.bias_by_layer:
            self.relpos_bias = RelativeBias(c)

    def read(self, encoded):
        """Keys and values of the encoder's hidden states, which go on to the next layer."""
        return encoded, self.encoder_decoder_attention.read(encoded)

    def __call__(self, x, context, encoded, sight, deterministic, read_at=None):
        drop = functools.partial(self.dropout, deterministic=deterministic)
        if self.config.bias_by_layer:
            sight = sight.biased_by(self.relpos_bias)
        with jax.named_scope("attention"):
            normal = self.pre_self_attention_layer_norm(x)
            mixed, own = self.self_attention(normal, context, sight, read_at)
            x = x if read_at is None else take_tokens(x, read_at)
            x = x + drop(mixed)
        with jax.named_scope("encoder_decoder_attention"):
            (mask,) = sight.encoded if read_at is None else sight.at(read_at).encoded
            normal = self.pre_cross_attention_layer_norm(x)
            x = x + drop(self.encoder_decoder_attention(normal, encoded, mask))
        with jax.named_scope("mlp"):
            x = x + drop(self.mlp(self.pre_mlp_layer_norm(x)))
        return constrain(x, "activation_batch", None, "activation_embed"), own


def _mlp(config: Any, **named: str) -> nn.Module:
    return (MLP if config.activation == PLAIN else GatedMLP)(config, **named)


def _scan(config: Any, length: int, **axes: Any) -> dict[str, Any]:
    """How `nn.scan` goes over layers."""
    return dict(
        variable_axes={"params": 0},
        split_rngs={"params": True, "dropout": True},
        out_axes=0,
        length=length,
        unroll=min(config.scan_unroll, length),
        metadata_params={nn.PARTITION_NAME: "layers"},
        **axes,
    )


def _rematerialised(
    block: type[nn.Module], config: Any, length: int, deterministic: int
) -> type[nn.Module]:
    """A block that training computes again as the configuration says.

    Args:
      block: of layers.
      config: of the network.
      length: how many layers there are.
      deterministic: its place among the block's arguments, itself included.
    """
    if config.remat == "none":
        return block
    return nn.remat(
        block,
        policy=REMAT[config.remat],
        prevent_cse=config.scan_unroll >= length,  # a loop keeps XLA from undoing it
        static_argnums=(deterministic,),
    )
